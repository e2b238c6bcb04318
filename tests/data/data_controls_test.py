"""Case C10: flat depth, grey and 1-bit conditions."""

import numpy as np
import pytest

from scar_jax.data import controls
from scar_jax.data.geometry import to_float
from scar_jax.data.records import RecordError
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
