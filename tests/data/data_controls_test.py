"""Control maps: case C10, the kinds, and where a record's map comes from."""

import numpy as np
import pytest
from PIL import Image

from scar_jax.data import controls
from scar_jax.data.geometry import to_float, to_uint8
from scar_jax.data.pipeline import make_loader
from scar_jax.data.records import Record, RecordError
from scar_jax.data.transforms import decode


@pytest.mark.parametrize('rule', controls.DEPTH_RULES)
def test_c10_flat_depth_is_finite(case, rule):
  zero = controls.depth(case('c10_depth_zero_L.png'), rule)
  assert zero.shape == (32, 32, 3)
  assert (to_float(zero) == -1).all()
  const = controls.depth(case('c10_depth_const_L.png'), rule)
  stored = decode(case('c10_depth_const_L.png'))
  assert len(np.unique(stored)) == 1
  assert stored.max() < 255
  # Never stretched to the maximum: kept, or 0 by the stated min-max rule.
  assert (const == (stored if rule == 'stored' else 0)).all()


def test_c10_white_edges_are_white(case):
  edges = to_float(decode(case('c10_edges_1bit.png')))
  assert edges.shape == (32, 32, 3)
  assert np.unique(edges).tolist() == [-1.0, 1.0]


def test_depth_in_any_unit_is_stretched():
  metres = np.array([[0.5, 40.25], [80.0, 0.5]], np.float32)
  assert controls.depth(metres, 'minmax')[..., 0].tolist() == [
    [0, 128],
    [255, 0],
  ]
  with pytest.raises(RecordError, match='min-max'):
    controls.depth(metres)
  metres[0, 0] = np.inf
  with pytest.raises(RecordError, match=r'd\.tif: holds NaN'):
    controls.depth(metres, 'minmax', 'd.tif')
  with pytest.raises(ValueError, match="'mean'; accepted: stored, minmax"):
    controls.depth(metres, 'mean')


def test_16_bit_depth_is_stretched_without_saturation(case):
  found = controls.depth(case('c04_depth16.png'), 'minmax')
  assert found[0, 2::4, 0].tolist() == [0, 1, 100, 128, 255]


def test_canny_finds_the_border():
  image = np.zeros((32, 32, 3), np.uint8)
  image[:, 16:] = 255
  edges = controls.canny(image)
  assert edges.shape == (32, 32, 3)
  assert set(np.unique(edges)) == {0, 255}
  assert edges[:, 14:18].any(axis=(1, 2)).all()
  assert not edges[:, :14].any()


def _photo(size=(24, 32), seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (*size, 3), np.uint8)


def test_canny_draws_its_thresholds_only_in_training():
  assert controls.thresholds(None) == {}
  drawn = [
    tuple(controls.thresholds(np.random.default_rng(i)).values())
    for i in range(50)
  ]
  low, high = np.array(drawn).T
  assert (low.min(), low.max()) >= (50, 100)
  assert low.max() <= 150
  assert ((high - low >= 50) & (high - low <= 150)).all()
  assert len(set(drawn)) > 40


def test_line_art_is_white_where_a_picture_has_dark_lines():
  image = np.full((32, 32, 3), 230, np.uint8)
  assert not controls.line_art(image).any()
  image[:, 15:17] = 20
  lines = controls.line_art(image)
  assert lines.shape == image.shape
  assert (lines[:, 15:17] == 255).all()
  assert not lines[:, :8].any()


def test_a_sketch_has_strokes_of_one_width_along_ridges():
  edges = np.zeros((64, 64), np.uint8)
  assert not controls.sketch(edges).any()
  # Wide and soft, and fading, so that nothing is flat along it.
  across, along = np.abs(np.arange(-10, 11)), np.arange(64)[:, None]
  edges[:, 22:43] = 255 - 10 * across - along
  strokes = controls.sketch(edges)
  assert set(np.unique(strokes)) == {0, 255}
  rows = strokes[16:40] > 0
  assert (rows.sum(axis=1) == 11).all()
  assert rows[:, 32].all()
  faint = controls.sketch((edges // 4).astype(np.uint8))
  assert not faint.any()


def test_every_segment_has_the_colour_of_pascal_voc():
  labels = np.array([[0, 1, 2], [3, 15, 255]])
  assert controls.segments(labels).tolist() == [
    [[0, 0, 0], [128, 0, 0], [0, 128, 0]],
    [[128, 128, 0], [192, 128, 128], [224, 224, 192]],
  ]
  with pytest.raises(RecordError, match=r'a\.png: labels from -1 to 2'):
    controls.segments(np.array([[-1, 2]]), 'a.png')
  with pytest.raises(RecordError, match=r'float64 \(1, 2\); accepted: whole'):
    controls.segments(np.array([[0.0, 2.0]]))


@pytest.mark.parametrize(
  ('key', 'name'),
  [
    ('n01/a.JPEG', 'n01/a.png'),
    ('set/train/12', 'set/train/12.png'),
    ('/abs/../x.jsonl:7', 'abs/x.jsonl:7.png'),
    ('v1.5', 'v1.5.png'),
  ],
)
def test_the_map_of_a_record_stays_in_its_folder(key, name):
  assert controls.map_name(key) == name


class Photos:
  """Pictures without a condition."""

  def __len__(self):
    return 6

  def describe(self):
    return 'photos'

  def load(self, i, rng=None):
    return Record(target=_photo(seed=i), label=i, key=f'c/{i}.jpg')


def test_a_drawn_map_is_that_of_the_cropped_target():
  source = controls.Controlled(Photos(), ('canny', 'lineart'))
  loader = make_loader(source, None, 4, 16, seed=1, train=False)
  batch = next(loader)
  target = to_uint8(batch['target'])
  for row in range(4):
    draw = controls.line_art if row % 2 else controls.canny
    np.testing.assert_array_equal(
      to_uint8(batch['condition'][row]), draw(target[row])
    )
  assert batch['label'].tolist() == [0, 1, 2, 3]
  assert source.describe() == ('photos; control canny (drawn), lineart (drawn)')


def test_a_stored_map_is_cropped_with_its_picture(tmp_path):
  (tmp_path / 'hed/c').mkdir(parents=True)
  for i in range(5):
    Image.fromarray(_photo(seed=i)).save(tmp_path / f'hed/c/{i}.png')
  source = controls.Controlled(Photos(), ('hed',), str(tmp_path))
  loader = make_loader(source, None, 6, 16, train=False, max_bad_share=0.5)
  batch = next(loader)
  # The map of each is the picture itself here; one has none.
  np.testing.assert_array_equal(batch['condition'], batch['target'])
  assert batch['valid'].tolist() == [True] * 5 + [False]
  with pytest.raises(RecordError, match=r'c/5\.jpg: hed map .*5\.png'):
    source.load(5)


def test_the_kind_is_drawn_in_training_alone():
  source = controls.Controlled(Photos(), ('canny', 'lineart'))
  fixed = {source.load(0).draw == controls.line_art for _ in range(3)}
  assert fixed == {False}
  drawn = [
    source.load(0, np.random.default_rng(i)).draw == controls.line_art
    for i in range(20)
  ]
  assert {True, False} == set(drawn)


def test_controls_without_maps_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"data.control='edge'; accepted: canny"):
    controls.Controlled(Photos(), ('edge',))
  with pytest.raises(ValueError, match=r"control='hed' needs maps.*--kind=hed"):
    controls.Controlled(Photos(), ('canny', 'hed'), str(tmp_path))


def test_a_label_out_of_range_is_a_bad_record(caplog):
  loader = make_loader(
    Photos(), None, 6, 16, train=False, classes=5, max_bad_share=0.5
  )
  assert next(loader)['valid'].tolist() == [True] * 5 + [False]
  assert 'label 5; accepted: 0 to 4' in caplog.text
