"""PSNR, MSE, SSIM and MS-SSIM of two pictures, in float64.

In: pictures `[H, W]` or `[H, W, C]`, uint8 or floats of range 1. Out: one
number, without the factors that tables print it with. Called by `pie.py` and
`maps.py`. Source: torchmetrics 1.9, compared with it through the fixture
`metrics`.
"""

import numpy as np
from jaxtyping import Float, Shaped
from scipy import ndimage

# What equal pictures score, dB; JSON has no infinity.
MAX_PSNR = 99.0
_SIGMA, _RADIUS = 1.5, 5
_K1, _K2 = 0.01, 0.03
# Exponents of the five scales, the full size first.
_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Below it the window does not fit into the smallest scale.
MS_SSIM_SIDE = 2 * _RADIUS * 2 ** (len(_BETAS) - 1) + 1

Picture = Shaped[np.ndarray, 'H W *C']


def as_float(
  a: Picture, b: Picture
) -> tuple[Float[np.ndarray, 'H W *C'], Float[np.ndarray, 'H W *C']]:
  """Both pictures in float64, uint8 divided by 255.

  Raises:
    ValueError: two shapes, or an empty picture.
  """
  if a.shape != b.shape or not a.size:
    raise ValueError(
      f'pictures of shapes {a.shape} and {b.shape}; accepted: one shape, not '
      'empty'
    )
  first, second = (
    x / 255 if x.dtype == np.uint8 else x.astype(np.float64) for x in (a, b)
  )
  return first, second


def mse(a: Picture, b: Picture) -> float:
  """Mean squared difference over all pixels and channels."""
  first, second = as_float(a, b)
  return float(np.mean((first - second) ** 2))


def psnr(a: Picture, b: Picture) -> float:
  """DB at a range of 1, at most `MAX_PSNR`."""
  error = mse(a, b)
  if error == 0:
    return MAX_PSNR
  return float(min(MAX_PSNR, -10 * np.log10(error)))


def ssim(a: Picture, b: Picture, valid: bool = False) -> float:
  """Structural similarity, Gaussian window of 11 x 11.

  Args:
    a: a picture.
    b: another.
    valid: average where the window fits, as scikit-image; by default over the
      whole picture, reflected at its borders, as torchmetrics and all published
      PIE-Bench numbers.

  Raises:
    ValueError: the window does not fit.
  """
  similarity, _ = _terms(*as_float(a, b))
  return float(np.mean(_inner(similarity) if valid else similarity))


def ms_ssim(a: Picture, b: Picture) -> float:
  """The product over five scales, each half as large as the one before.

  The contrast of the first four is averaged where the window fits, the
  similarity of the last over all of it; negative terms count as 0.

  Raises:
    ValueError: a side below `MS_SSIM_SIDE`.
  """
  first, second = as_float(a, b)
  if min(first.shape[:2]) < MS_SSIM_SIDE:
    raise ValueError(
      f'MS-SSIM of {first.shape[1]}x{first.shape[0]} pixels; accepted: sides '
      f'of {MS_SSIM_SIDE} or more'
    )
  product = 1.0
  for scale, beta in enumerate(_BETAS):
    last = scale == len(_BETAS) - 1
    similarity, contrast = _terms(first, second)
    term = np.mean(similarity if last else _inner(contrast))
    product *= max(float(term), 0.0) ** beta
    first, second = _halved(first), _halved(second)
  return product


def _terms(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Similarity and contrast of every pixel."""
  if min(a.shape[:2]) < 2 * _RADIUS + 1:
    raise ValueError(
      f'SSIM of {a.shape[1]}x{a.shape[0]} pixels; accepted: sides of '
      f'{2 * _RADIUS + 1} or more, those of its window'
    )
  mean_a, mean_b = _blur(a), _blur(b)
  var_a = np.maximum(_blur(a * a) - mean_a**2, 0)
  var_b = np.maximum(_blur(b * b) - mean_b**2, 0)
  both = _blur(a * b) - mean_a * mean_b
  c1, c2 = _K1**2, _K2**2
  contrast = (2 * both + c2) / (var_a + var_b + c2)
  light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
  return light * contrast, contrast


def _blur(x: np.ndarray) -> np.ndarray:
  taps = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
  taps /= taps.sum()
  for axis in (0, 1):
    # scipy's `mirror` is torch's `reflect`: the border pixel is not repeated.
    x = ndimage.correlate1d(x, taps, axis=axis, mode='mirror')
  return x


def _inner(x: np.ndarray) -> np.ndarray:
  return x[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]


def _halved(x: np.ndarray) -> np.ndarray:
  """Means of 2 x 2; an odd last row or column is left out."""
  h, w = x.shape[0] // 2, x.shape[1] // 2
  blocks = x[: 2 * h, : 2 * w].reshape(h, 2, w, 2, *x.shape[2:])
  return blocks.mean((1, 3))
