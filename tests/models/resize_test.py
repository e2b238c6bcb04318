import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models import resize as R


def _nhwc(x):
  return np.transpose(x, (0, 2, 3, 1))


def _cases(arrays):
  """(key of the result, key of the input, mode, factor offset or None)."""
  for key in sorted(arrays):
    if not key.endswith('_out') or key.startswith('pixel'):
      continue
    name = key.removesuffix('_out')
    mode = re.match(r'[a-z]+(_aa)?', name)[0]
    offset = 0.1 if 'offset01' in name else None
    name = re.sub(r'_(size|scale_offset01)$', '', name)
    source = f'{name}_in'
    if source not in arrays:  # one input serves several sizes
      side = re.search(r'_(\d+)_\d+$', name)[1]
      source = 'bicubic_37_32_in' if side == '37' else f'{mode}_{side}_in'
    yield key, source, mode, offset


def test_every_size_and_mode_as_torch(golden):
  _, arrays = golden('resize')
  cases = list(_cases(arrays))
  assert len(cases) == len([k for k in arrays if k.endswith('_out')]) - 1

  @jax.jit  # one program for all
  def run(arrays):
    made = {}
    for key, source, mode, offset in cases:
      x, size = arrays[source], arrays[key].shape[1:3]
      factor = None
      if offset:
        factor = tuple(
          (m + offset) / n for m, n in zip(size, x.shape[1:3], strict=True)
        )
      made[key] = R.resize(x, size, mode, factor)
    return made

  wanted = {name: _nhwc(x) for name, x in arrays.items() if x.ndim == 4}
  for key, got in run(wanted).items():
    np.testing.assert_allclose(got, wanted[key], 0, 1e-5, err_msg=key)


def test_pixel_shuffle_channel_order(golden):
  _, arrays = golden('resize')
  x, want = (_nhwc(arrays[f'pixelshuffle2_{k}']) for k in ('in', 'out'))
  np.testing.assert_array_equal(R.pixel_shuffle(x, 2), want)
  np.testing.assert_array_equal(R.pixel_unshuffle(want, 2), x)


@pytest.mark.parametrize('mode', R.MODES)
def test_a_constant_map_stays_constant(mode):
  out = R.resize(jnp.full((2, 5, 7, 1), 3.0), (8, 3), mode)
  np.testing.assert_allclose(out, np.full((2, 8, 3, 1), 3.0), rtol=1e-6)


def test_coordinates_are_float32():
  # Column 37 of 64 -> 112 in float64 is 1.1e-6 away from the float32 one.
  x32 = (np.float32(37) + np.float32(0.5)) * np.float32(64 / 112) - 0.5
  row = R.resize_matrix(64, 112, 'bilinear')[37]
  assert row[21] == np.float32(x32 - np.float32(20))


def test_errors_name_what_is_accepted():
  with pytest.raises(ValueError, match="mode 'lanczos'; accepted: nearest"):
    R.resize_matrix(4, 2, 'lanczos')
  with pytest.raises(ValueError, match='from 4 to 0 pixels; accepted: 1'):
    R.resize_matrix(4, 0, 'area')
