import numpy as np
import pytest
from PIL import Image

from scar_jax.data.geometry import letterbox_box
from scar_jax.data.masks import composite, decode_mask, known_cells
from scar_jax.data.records import RecordError


def test_a_mask_is_white_from_mid_grey_on(case):
  grey = np.array([[0, 127, 128, 255]], np.uint8)
  assert decode_mask(grey, (1, 4)).tolist() == [[False, False, True, True]]
  colours = np.array([[[255, 0, 0], [255, 255, 250]]], np.uint8)
  assert decode_mask(colours, (1, 2)).tolist() == [[False, True]]
  assert decode_mask(grey > 0, (1, 4)).tolist() == [[False, True, True, True]]
  hole = np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)  # transparent
  assert decode_mask(hole, (1, 2)).tolist() == [[False, True]]
  edges = case('c10_edges_1bit.png')
  size = Image.open(edges).size[::-1]
  assert decode_mask(edges, size).any()


def test_bad_masks_are_errors_that_name_them(case):
  with pytest.raises(RecordError, match='mask of 3x2 pixels for a pictu'):
    decode_mask(np.ones((2, 3), bool), (2, 4), 'm.png')
  with pytest.raises(RecordError, match=r'm.png: the mask has no white pixel'):
    decode_mask(np.zeros((2, 4), np.uint8), (2, 4), 'm.png')
  with pytest.raises(RecordError, match=r'c06_html_not_image\.jpg: not'):
    decode_mask(case('c06_html_not_image.jpg'), (2, 4))
  with pytest.raises(RecordError, match='missing file'):
    decode_mask('nowhere.png', (2, 4))


def _cells(mask, canvas, grid):
  box = letterbox_box(mask.shape, canvas)
  return known_cells(mask, box, (grid, grid))


def test_one_pixel_unmakes_its_cell():
  for y, x in ((0, 0), (3, 4), (7, 7), (4, 3)):
    mask = np.zeros((8, 8), bool)
    mask[y, x] = True
    cells = _cells(mask, 8, 4)
    assert cells.sum() == 15
    assert not cells[y // 2, x // 2]


def test_a_thin_line_in_a_large_picture_is_not_lost():
  mask = np.zeros((400, 400), bool)
  mask[201] = True  # less than a pixel of the canvas
  cells = _cells(mask, 8, 4)
  assert cells.tolist() == [[True] * 4] * 2 + [[False] * 4] + [[True] * 4]


def test_a_pixel_of_a_small_picture_unmakes_all_cells_it_fills():
  mask = np.zeros((2, 3), bool)
  mask[0, 1] = True  # columns 2.67 to 5.33, rows 1 to 4 of the canvas
  cells = _cells(mask, 8, 4)
  expected = np.ones((4, 4), bool)
  expected[0:2, 1:3] = False  # the border above repeats this pixel
  assert cells.tolist() == expected.tolist()


def test_cells_beside_the_picture_follow_its_border():
  mask = np.zeros((4, 8), bool)
  mask[0] = True  # rows 2 to 5 of the canvas; the padding repeats the border
  cells = _cells(mask, 8, 4)
  assert cells.tolist() == [[False] * 4] * 2 + [[True] * 4] * 2
  assert not _cells(np.ones((4, 8), bool), 8, 4).any()


def test_the_composite_keeps_source_pixels():
  made, source = np.full((2, 2, 3), 9, np.uint8), np.zeros((2, 2, 3), np.uint8)
  mask = np.array([[True, False], [False, True]])
  assert composite(made, source, mask)[..., 0].tolist() == [[9, 0], [0, 9]]
