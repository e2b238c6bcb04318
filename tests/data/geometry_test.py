"""Case C08: one policy of sizes for picture, condition and mask."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from scar_jax.data import geometry
from scar_jax.data.transforms import decode


def test_c08_sizes(case):
  image = decode(case('c08_37x53.png'))
  height, width = image.shape[:2]
  up = geometry.round_up(width, 16), geometry.round_up(height, 16)
  assert up == (48, 64)
  boxed, box = geometry.letterbox(image, (64, 48))
  assert boxed.shape == (64, 48, 3)
  assert geometry.unletterbox(boxed, box).shape == (53, 37, 3)
  assert geometry.unletterbox(boxed, box, (631, 512)).shape == (631, 512, 3)
  wide = decode(case('c08_546x39.png'))
  assert geometry.patch_grid((14, wide.shape[1]), 14)[1] == 39


def test_c08_a_side_that_does_not_divide_is_named():
  with pytest.raises(ValueError, match=r'37x53 is no multiple.*48x'):
    geometry.patch_grid((37, 53), 16)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  st.integers(1, 90), st.integers(1, 90), st.sampled_from([16, 32, (16, 48)])
)
def test_letterbox_gives_the_size_back(height, width, size):
  image = np.full((height, width, 3), 7, np.uint8)
  boxed, box = geometry.letterbox(image, size)
  assert boxed.shape[:2] == geometry.as_size(size)
  assert (boxed == 7).all()
  back = geometry.unletterbox(boxed, box)
  assert back.shape == image.shape
  mask, _ = geometry.letterbox(np.ones((height, width), np.uint8), size)
  assert mask.sum() == box.height * box.width
  assert geometry.unletterbox(mask, box).all()


def test_letterbox_and_back_is_exact_where_nothing_is_scaled():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (20, 32, 3), np.uint8)
  boxed, box = geometry.letterbox(image, 32, 'white')
  assert (boxed[:6] == 255).all()
  assert (geometry.unletterbox(boxed, box) == image).all()
  with pytest.raises(ValueError, match=r'\(20, 32\).*\(32, 32\)'):
    geometry.unletterbox(image, box)


def test_crop_is_the_same_for_every_picture():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (40, 60, 3), np.uint8)
  mask = image[..., 0]
  places = [np.random.default_rng(3), np.random.default_rng(3)]
  a, b, none = geometry.crop([image, image.copy(), None], 32, 1.5, places[0])
  assert (a == b).all()
  assert none is None
  assert (a == geometry.crop([image], 32, 1.5, places[1])[0]).all()
  assert (a != geometry.crop([image], 32, 1.5)[0]).any()
  assert geometry.crop([image, mask], 32)[1].shape == (32, 32)


def test_crop_takes_the_centre_of_the_resized_shorter_side():
  # 64 x 32 halved is 32 x 16, of which columns 8 to 24 remain.
  image = np.zeros((32, 64, 3), np.uint8)
  image[:, 16:48] = 200
  assert (geometry.crop([image], 16)[0][:, 2:-2] >= 199).all()
  shifted = np.roll(image, 32, axis=1)
  assert (geometry.crop([shifted], 16)[0][:, 2:-2] <= 1).all()


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(
  st.integers(1, 70), st.integers(1, 70), st.floats(1, 2), st.booleans()
)
def test_crop_always_covers(height, width, ratio, drawn):
  image = np.full((height, width, 3), 9, np.uint8)
  rng = np.random.default_rng(0) if drawn else None
  found = geometry.crop([image], (24, 16), ratio, rng)[0]
  assert found.shape == (24, 16, 3)
  assert (found == 9).all()


def test_nearest_keeps_class_numbers():
  labels = np.array([[0, 255], [7, 150]], np.int32)
  up = geometry.resize_nearest(labels, (4, 6))
  assert up[:2, :3].tolist() == [[0] * 3] * 2
  assert set(up.ravel()) == {0, 7, 150, 255}
  assert (geometry.resize_nearest(up, 2) == labels).all()


def test_range_is_minus_one_to_one_and_back_exactly():
  values = np.arange(256, dtype=np.uint8)
  scaled = geometry.to_float(values)
  assert scaled.dtype == np.float32
  assert scaled[[0, 255]].tolist() == [-1.0, 1.0]
  assert (geometry.to_uint8(scaled) == values).all()
  assert geometry.to_uint8(np.array([-3.0, 3.0])).tolist() == [0, 255]
  with pytest.raises(ValueError, match='NaN'):
    geometry.to_uint8(np.array([np.nan]))
