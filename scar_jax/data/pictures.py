"""Pictures and masks of one record, with errors that name the record.

In: what a source read (a path or bytes), the name that the record gave it, the
key of the record. Out: uint8 arrays, or a `RecordError`. Called by every
source that reads files.
"""

import numpy as np
from jaxtyping import UInt8

from scar_jax.data.controls import depth
from scar_jax.data.records import RecordError
from scar_jax.data.transforms import (
  ImageLike,
  decode,
  header_size,
  load_image,
)


def picture(
  image: ImageLike, name: str, key: str, stretched: bool = False
) -> UInt8[np.ndarray, 'H W 3']:
  """A picture as uint8 RGB.

  Args:
    image: path or content.
    name: of the picture, for messages.
    key: of the record.
    stretched: a depth map, whose minimum becomes 0 and maximum 255.

  Raises:
    RecordError: see `transforms.decode`.
  """
  try:
    return depth(image, 'minmax', name) if stretched else decode(image, name)
  except RecordError as error:
    raise RecordError(key, f'{error.key}: {error.reason}') from error


def size(image: ImageLike, name: str, key: str) -> tuple[int, int]:
  """(height, width) of a picture, from its header.

  Args:
    image: path or content.
    name: of the picture, for messages.
    key: of the record.

  Raises:
    RecordError: see `transforms.header_size`.
  """
  try:
    return header_size(image, name)
  except RecordError as error:
    raise RecordError(key, f'{error.key}: {error.reason}') from error


def mask(
  image: ImageLike, name: str, key: str, like: UInt8[np.ndarray, 'H W 3']
) -> UInt8[np.ndarray, 'H W']:
  """Where the edit may change pixels: grey, or 255 where it is transparent.

  Of a picture with a hole cut into it (MagicBrush) the hole is the mask;
  otherwise the first channel is.

  Args:
    image: path or content.
    name: of the mask, for messages.
    key: of the record.
    like: the picture that it lies on.

  Raises:
    RecordError: unreadable, or of another size than the picture.
  """
  try:
    loaded = load_image(image, name)
  except RecordError as error:
    raise RecordError(key, f'{error.key}: {error.reason}') from error
  found = None
  if 'A' in loaded.image.getbands():
    alpha = np.array(loaded.image.getchannel('A'))
    found = 255 - alpha if (alpha < 255).any() else None
  if found is None:
    found = picture(loaded.image, name, key)[..., 0]
  if found.shape != like.shape[:2]:
    (h, w), (height, width) = found.shape, like.shape[:2]
    raise RecordError(
      key,
      f'{name}: a mask of {w}x{h} pixels for a picture of {width}x{height}',
    )
  return found
