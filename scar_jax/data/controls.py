"""Control maps: depth, edges, line art, as pictures that condition.

In: a picture, or a map of one channel in any stored depth. Out: uint8 RGB
`[H, W, 3]`, grey repeated. Nothing here divides by what may be zero.
"""

import numpy as np
from jaxtyping import Num, UInt8

from scar_jax.data.records import RecordError
from scar_jax.data.transforms import (
  ImageLike,
  decode,
  load_image,
  to_byte_range,
)
from scar_jax.extras import require

DEPTH_RULES = ('stored', 'minmax')


def depth(
  image: ImageLike, rule: str = 'stored', name: str = ''
) -> UInt8[np.ndarray, 'H W 3']:
  """A depth map as a condition picture.

  Args:
    image: file, bytes, Pillow image, or array of one channel.
    rule: 'stored' keeps the scale of the file (see `transforms.to_byte_range`);
      'minmax' stretches the map to 0..255, and a flat map becomes 0.
    name: for messages.

  Raises:
    RecordError: not an image, or values that the rule cannot take.
  """
  if rule not in DEPTH_RULES:
    raise ValueError(f'depth rule {rule!r}; accepted: {", ".join(DEPTH_RULES)}')
  if rule == 'stored':
    return decode(image, name)
  if isinstance(image, np.ndarray):
    values = image
  else:
    loaded = load_image(image, name)
    # Other modes hold colours; their stated grey is the first RGB channel.
    grey = loaded.image.mode in ('L', '1', 'F')
    grey = grey or loaded.image.mode.startswith('I')
    values = np.asarray(loaded.image) if grey else decode(loaded.image)[..., 0]
  if values.ndim == 3 and values.shape[-1] == 1:
    values = values[..., 0]
  if values.ndim != 2 or not values.size:
    raise RecordError(
      name or 'depth map', f'shape {values.shape}; accepted: [H, W], [H, W, 1]'
    )
  return decode(stretch(values, name))


def stretch(
  values: Num[np.ndarray, 'H W'], name: str = ''
) -> UInt8[np.ndarray, 'H W']:
  """Minimum to 0, maximum to 255; a flat map to 0.

  Raises:
    RecordError: a value is not finite.
  """
  values = values.astype(np.float64)
  if not np.isfinite(values).all():
    raise RecordError(name or 'depth map', 'holds NaN or infinite values')
  low, high = values.min(), values.max()
  if high == low:
    return np.zeros(values.shape, np.uint8)
  return to_byte_range((values - low) / (high - low))


def canny(
  image: UInt8[np.ndarray, 'H W 3'], low: int = 100, high: int = 200
) -> UInt8[np.ndarray, 'H W 3']:
  """White edges on black, by OpenCV's detector (thresholds of ControlAR, CAR).

  Raises:
    ValueError: OpenCV is not installed.
  """
  cv2 = require('cv2', 'data')
  edges = cv2.Canny(np.ascontiguousarray(image), low, high)
  return np.repeat(edges[..., None], 3, axis=-1)


def line_art(image: ImageLike, name: str = '') -> UInt8[np.ndarray, 'H W 3']:
  """Line art as drawn: one channel repeated, polarity kept."""
  return decode(image, name)
