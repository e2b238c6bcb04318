"""Resizing that reproduces PyTorch's interpolation to float32 rounding.

In: maps `[..., H, W, C]`, a wanted size, a mode. Out: the resized map. Each
axis is a fixed matrix built in numpy, so a resize is two einsums and has an
exact gradient. `jax.image` differs (other cubic kernel, renormalised borders).
Source: method 2.3, PyTorch `interpolate` with align_corners False.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

MODES = (
  'nearest',
  'area',  # adaptive average pooling
  'bilinear',
  'bilinear_aa',
  'bilinear_corners',  # align_corners: corner pixels onto corner pixels
  'bicubic',  # kernel with a = -0.75
  'bicubic_aa',  # kernel with a = -0.5
)


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(1 - np.abs(x), 0)


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
  """Keys' cubic convolution kernel."""

  def kernel(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))

  return kernel


def _scatter(m: int, n: int, taps: np.ndarray, weights: np.ndarray):
  """Row i gets `weights[i]` at `taps[i]`, clamped into the map, summed."""
  matrix = np.zeros((m, n))
  rows = np.broadcast_to(np.arange(m)[:, None], taps.shape)
  np.add.at(matrix, (rows, np.clip(taps, 0, n - 1)), weights)
  return matrix


def _interpolating(m: int, n: int, step: np.float32, mode: str) -> np.ndarray:
  # The reference computes x in float32 from a float32 step; weights are free
  # of further rounding here.
  x = (np.arange(m, dtype=np.float32) + np.float32(0.5)) * step
  x = x - np.float32(0.5)
  if mode == 'bilinear':
    x = np.maximum(x, 0)
  elif mode == 'bilinear_corners':
    x = np.arange(m, dtype=np.float32) * (np.float32(n - 1) / max(m - 1, 1))
  floor = np.floor(x)
  offsets = np.arange(-1, 3) if mode == 'bicubic' else np.arange(2)
  distance = (x - floor).astype(np.float64)[:, None] - offsets
  kernel = _cubic(-0.75) if mode == 'bicubic' else _triangle
  taps = floor.astype(np.int64)[:, None] + offsets
  return _scatter(m, n, taps, kernel(distance))


def _antialiased(m: int, n: int, step: np.float32, mode: str) -> np.ndarray:
  width = max(step, np.float32(1))
  cubic = mode == 'bicubic_aa'
  radius = width * np.float32(2 if cubic else 1)
  kernel = _cubic(-0.5) if cubic else _triangle
  matrix = np.zeros((m, n))
  for i in range(m):
    centre = (np.float32(i) + np.float32(0.5)) * step
    first = max(int(centre - radius + np.float32(0.5)), 0)
    last = min(int(centre + radius + np.float32(0.5)), n)
    j = np.arange(first, last)
    weights = kernel((j - np.float64(centre) + 0.5) / np.float64(width))
    matrix[i, first:last] = weights / weights.sum()
  return matrix


def _area(m: int, n: int) -> np.ndarray:
  matrix = np.zeros((m, n))
  for i in range(m):
    first, last = i * n // m, -(-(i + 1) * n // m)
    matrix[i, first:last] = 1 / (last - first)
  return matrix


@functools.lru_cache(maxsize=512)
def resize_matrix(
  n: int, m: int, mode: str, factor: float | None = None
) -> Float[np.ndarray, 'm n']:
  """The matrix that takes one axis from n to m pixels. Do not write to it.

  Args:
    n: pixels in.
    m: pixels out.
    mode: a value of `MODES`.
    factor: output over input, where it is not m / n. DINOv2 passes
      (m + 0.1) / n, which moves every sample point.

  Raises:
    ValueError: unknown mode, or a side below 1.
  """
  if mode not in MODES:
    raise ValueError(f'resize mode {mode!r}; accepted: {", ".join(MODES)}')
  if n < 1 or m < 1:
    raise ValueError(f'resize from {n} to {m} pixels; accepted: 1 or more')
  if factor is None:
    step = np.float32(n) / np.float32(m)
  else:
    step = np.float32(1.0 / factor)
  if mode == 'area':
    matrix = _area(m, n)
  elif mode == 'nearest':
    source = np.floor(np.arange(m, dtype=np.float32) * step).astype(np.int64)
    matrix = _scatter(m, n, source[:, None], np.ones((m, 1)))
  elif mode.endswith('_aa'):
    matrix = _antialiased(m, n, step, mode)
  else:
    matrix = _interpolating(m, n, step, mode)
  matrix = matrix.astype(np.float32)
  matrix.setflags(write=False)
  return matrix


def resize(
  x: Float[Array, '*B H W C'],
  size: tuple[int, int],
  mode: str,
  factor: tuple[float, float] | None = None,
) -> Float[Array, '*B h w C']:
  """Resizes the two spatial axes, in float32.

  Args:
    x: maps, channels last.
    size: (rows, columns) of the result.
    mode: a value of `MODES`.
    factor: per axis, see `resize_matrix`.
  """
  factors = factor or (None, None)
  rows, cols = (
    resize_matrix(n, m, mode, f)
    for n, m, f in zip(x.shape[-3:-1], size, factors, strict=True)
  )
  exact = jax.lax.Precision.HIGHEST
  x = jnp.einsum('mh,...hwc->...mwc', rows, x, precision=exact)
  return jnp.einsum('nw,...mwc->...mnc', cols, x, precision=exact)


def pixel_shuffle(
  x: Float[Array, '*B h w rrC'], r: int
) -> Float[Array, '*B rh rw C']:
  """Channel `c r^2 + i r + j` goes to row i, column j of an r x r block."""
  *lead, h, w, channels = x.shape
  x = x.reshape(*lead, h, w, channels // r**2, r, r)
  x = jnp.moveaxis(x, (-2, -1), (-4, -2))
  return x.reshape(*lead, h * r, w * r, channels // r**2)


def pixel_unshuffle(
  x: Float[Array, '*B rh rw C'], r: int
) -> Float[Array, '*B h w rrC']:
  """The inverse of `pixel_shuffle`."""
  *lead, h, w, channels = x.shape
  x = x.reshape(*lead, h // r, r, w // r, r, channels)
  x = jnp.moveaxis(x, (-4, -2), (-2, -1))
  return x.reshape(*lead, h // r, w // r, channels * r**2)
