"""The one way a picture is decoded, sized and scaled, for every command.

In: bytes, a path, a Pillow image or an array. Out: uint8 RGB `[H, W, 3]`
(`decode`), class numbers `[H, W]` (`decode_label`), or a `RecordError` that
names the file and the reason. Sizes and the [-1, 1] range: `geometry.py`.

Colours: EXIF orientation is applied; transparency is blended on white; an
animation gives its first frame; embedded colour profiles are ignored. Bits:
1-bit white is 255; 16-bit is value / 257 rounded; float is [0, 1].
"""

import io
import os
import pathlib
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int32, Num, UInt8
from PIL import Image, ImageFile

from scar_jax.data.geometry import (
  Box,
  crop,
  letterbox,
  letterbox_like,
  resize,
  to_float,
  to_uint8,
  unletterbox,
)
from scar_jax.data.records import RecordError

__all__ = [
  'IGNORE_LABEL',
  'MAX_PIXELS',
  'Box',
  'ImageLike',
  'crop',
  'decode',
  'decode_label',
  'header_size',
  'letterbox',
  'letterbox_like',
  'load_image',
  'resize',
  'to_byte_range',
  'to_float',
  'to_uint8',
  'unletterbox',
]

ImageLike: TypeAlias = bytes | str | os.PathLike | Image.Image | np.ndarray

# Below Pillow's own limit (89 megapixels), so that ours is the one that speaks.
MAX_PIXELS = 80_000_000
IGNORE_LABEL = 255
# EXIF tag 274. Values 2-8 are the turns and mirrors of the dihedral group.
_ORIENTATION = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # height and width change places
# Where Pillow keeps an orientation; it turns a TIFF by itself.
_TURNS = ('exif', 'xmp', 'XML:com.adobe.xmp', 'Raw profile type exif')
_LOSSY = frozenset(('JPEG', 'MPO', 'WEBP', 'AVIF', 'JPEG2000'))


class Loaded(NamedTuple):
  """A picture as stored, upright, and how the file held it."""

  image: Image.Image
  format: str  # Pillow's name of the container; '' without a file
  packing: str  # Pillow's raw mode, such as 'L;4' for 4-bit grey


def decode(image: ImageLike, name: str = '') -> UInt8[np.ndarray, 'H W 3']:
  """Any picture as uint8 RGB.

  Args:
    image: file content, path, Pillow image, or array (`[H, W]` or
      `[H, W, 1|2|3|4]` of bool, uint8, uint16, or float in [0, 1]).
    name: what error messages call it; a path names itself.

  Raises:
    RecordError: missing, empty, truncated, not an image, too large, or values
      outside the stated range.
  """
  name = name or _name(image)
  if isinstance(image, np.ndarray):
    return _rgb_of_array(image, name)
  loaded = load_image(image, name)
  try:
    return np.ascontiguousarray(_rgb(loaded.image, name))
  except RecordError:
    raise
  except Exception as error:
    raise RecordError(name, f'cannot become RGB: {error}') from error


def load_image(image: ImageLike, name: str = '') -> Loaded:
  """The first frame, fully read and upright, in the mode of the file.

  Raises:
    RecordError: see `decode`.
  """
  name = name or _name(image)
  if isinstance(image, Image.Image):
    return _read(image, name)
  content = _content(image, name)
  try:
    opened = Image.open(io.BytesIO(content))
  except Image.UnidentifiedImageError as error:
    start = content[:16]
    raise RecordError(name, f'not an image (starts with {start!r})') from error
  except Exception as error:
    raise RecordError(name, f'cannot be decoded: {error}') from error
  return _read(opened, name)


def header_size(image: ImageLike, name: str = '') -> tuple[int, int]:
  """(height, width) that `decode` gives, from the header of a file alone.

  Raises:
    RecordError: missing, empty, or not an image.
  """
  name = name or _name(image)
  if isinstance(image, np.ndarray):
    if image.ndim < 2:
      raise RecordError(name, f'array of shape {image.shape} is no picture')
    return image.shape[0], image.shape[1]
  if isinstance(image, Image.Image):
    return _upright_size(image)
  # A path is opened, not read: most of a large file stays where it is.
  path = isinstance(image, (str, os.PathLike))
  file = image if path else io.BytesIO(_content(image, name))
  try:
    with Image.open(file) as opened:
      return _upright_size(opened)
  except Exception as error:
    raise RecordError(name, f'has no readable header: {error}') from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
  width, height = image.size
  tagged = image.format != 'TIFF' and any(tag in image.info for tag in _TURNS)
  turn = image.getexif().get(274, 1) if tagged else 1
  return (width, height) if turn in _SIDEWAYS else (height, width)


def decode_label(image: ImageLike, name: str = '') -> Int32[np.ndarray, 'H W']:
  """A segmentation map as class numbers; `IGNORE_LABEL` carries no loss.

  A palette image gives its indices, not its colours.

  Raises:
    RecordError: as `decode`; or lossy storage, where colours and numbers are
      not exact; or a colour picture, which holds no numbers.
  """
  name = name or _name(image)
  if isinstance(image, np.ndarray):
    return _label_of_array(image, name, f'{image.dtype} {image.shape}')
  loaded = load_image(image, name)
  stored, mode = loaded.format, loaded.image.mode
  if stored in _LOSSY or loaded.image.info.get('compression') == 'jpeg':
    raise RecordError(
      name,
      f'{stored} is lossy, so its values are not class numbers; store label'
      ' maps as PNG (palette or grey)',
    )
  array = np.asarray(loaded.image)
  if mode == 'PA':
    array = array[..., 0]
  # Grey of 2 and 4 bits arrives stretched to 8.
  step = {'L;2': 85, 'L;4': 17}.get(loaded.packing[:3], 1)
  return _label_of_array(array, name, f'mode {mode}') // step


def _label_of_array(array: np.ndarray, name: str, what: str) -> np.ndarray:
  if array.ndim != 2 or array.dtype.kind not in 'bui':
    raise RecordError(
      name,
      f'{what} holds no class numbers; accepted: palette, grey or 1-bit'
      ' images, integer arrays [H, W]',
    )
  return array.astype(np.int32)


def _name(image: ImageLike) -> str:
  if isinstance(image, (str, os.PathLike)):
    return str(image)
  if isinstance(image, Image.Image):
    return str(getattr(image, 'filename', '') or 'image')
  return 'array' if isinstance(image, np.ndarray) else 'image bytes'


def _content(image: Any, name: str) -> bytes:
  if isinstance(image, (bytes, bytearray, memoryview)):
    content = bytes(image)
  elif isinstance(image, (str, os.PathLike)):
    path = pathlib.Path(image)
    try:
      content = path.read_bytes()
    except FileNotFoundError:
      raise RecordError(name, 'missing file') from None
    except (OSError, ValueError) as error:
      reason = getattr(error, 'strerror', None) or str(error)
      raise RecordError(name, f'cannot be read: {reason}') from error
  else:
    raise RecordError(
      name,
      f'{type(image).__name__} is no picture; accepted: bytes, path, Pillow'
      ' image, array',
    )
  if not content:
    raise RecordError(name, 'empty file (0 bytes)')
  return content


def _read(opened: Image.Image, name: str) -> Loaded:
  width, height = opened.size
  if not 0 < width * height <= MAX_PIXELS:
    raise RecordError(
      name, f'{width}x{height} pixels; accepted: 1 to {MAX_PIXELS} in all'
    )
  if ImageFile.LOAD_TRUNCATED_IMAGES:
    raise RecordError(
      name,
      'ImageFile.LOAD_TRUNCATED_IMAGES is set by some code in this process;'
      ' half pictures would pass as whole ones, so nothing is decoded',
    )
  stored = opened.format or ''
  tiles = getattr(opened, 'tile', None)
  packing = tiles[0][3] if tiles else ''
  if isinstance(packing, tuple):
    packing = packing[0] if packing else ''
  try:
    opened.load()
    upright = _upright(opened)
  except Exception as error:
    # Decoders raise OSError, ValueError, SyntaxError, struct.error and more.
    raise RecordError(name, f'cannot be decoded: {error}') from error
  return Loaded(upright, stored, str(packing or ''))


def _upright(image: Image.Image) -> Image.Image:
  """Applies the EXIF orientation; a broken EXIF block counts as none."""
  try:
    # After `load`: PNG may carry EXIF behind the pixels, and the TIFF reader
    # turns the picture itself and drops the tag.
    orientation = image.getexif().get(274, 1)
  except Exception:
    orientation = 1
  turn = _ORIENTATION.get(orientation)
  if turn is None:
    return image
  image = image.transpose(turn)
  for block in _TURNS:
    image.info.pop(block, None)  # it would turn the picture once more
  return image


def _rgb(image: Image.Image, name: str) -> np.ndarray:
  mode = image.mode
  if mode == 'RGB' and 'transparency' not in image.info:
    return np.array(image)
  if mode == 'F' or mode.startswith('I'):
    return _rgb_of_array(_narrow(np.array(image)), name)
  if mode in ('La', 'RGBa'):  # premultiplied
    image = image.convert(mode.upper())
  if 'transparency' in image.info or mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa'):
    return _on_white(np.array(image.convert('RGBA')))
  if mode == 'LAB':
    from PIL import ImageCms

    to_rgb = ImageCms.buildTransform(
      ImageCms.createProfile('LAB'),
      ImageCms.createProfile('sRGB'),
      'LAB',
      'RGB',
    )
    converted = ImageCms.applyTransform(image, to_rgb)
    image = converted or image  # None only when done in place
  # CMYK: the reader has already undone Adobe's inverted storage.
  return np.array(image.convert('RGB'))


def _narrow(array: np.ndarray) -> np.ndarray:
  """Pillow keeps some 16-bit files as 32-bit integers."""
  if array.dtype.kind == 'i' and array.min() >= 0 and array.max() <= 65535:
    return array.astype(np.uint16)
  return array.astype(array.dtype.newbyteorder('='))


def _on_white(rgba: UInt8[np.ndarray, 'H W 4']) -> UInt8[np.ndarray, 'H W 3']:
  alpha = rgba[..., 3:].astype(np.uint32)
  blended = rgba[..., :3] * alpha + 255 * (255 - alpha)
  return ((blended + 127) // 255).astype(np.uint8)


def to_byte_range(
  array: Num[np.ndarray, '...'], name: str = 'array'
) -> UInt8[np.ndarray, '...']:
  """Numbers of any stored depth in 8-bit terms, by one rule per type.

  bool: 0 or 255. uint8: unchanged. uint16: value / 257. Float: [0, 1] times
  255. All rounded to the nearest.

  Raises:
    RecordError: values outside the range, or not finite.
  """
  if array.dtype == np.bool_:
    return array.astype(np.uint8) * 255
  if array.dtype == np.uint8:
    return array
  if array.dtype.kind not in 'uif':
    raise RecordError(name, f'values of type {array.dtype} are no picture')
  wide = array.dtype == np.uint16
  # Comparisons with NaN are false, so NaN fails here too.
  if not wide and not (
    array.dtype.kind == 'f' and array.min() >= 0 and array.max() <= 1
  ):
    raise RecordError(
      name,
      f'{array.dtype} values from {array.min()} to {array.max()}; accepted:'
      ' 8- or 16-bit integers, float in 0 to 1 (a depth map in other units'
      ' needs the min-max rule)',
    )
  if wide:
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
  return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


def _rgb_of_array(array: np.ndarray, name: str) -> UInt8[np.ndarray, 'H W 3']:
  if array.ndim == 2:
    array = array[..., None]
  if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4) or not array.size:
    raise RecordError(
      name,
      f'array of shape {array.shape}; accepted: [H, W] or [H, W, 1|2|3|4]',
    )
  if array.shape[0] * array.shape[1] > MAX_PIXELS:
    raise RecordError(name, f'shape {array.shape}: over {MAX_PIXELS} pixels')
  array = to_byte_range(array, name)
  channels = array.shape[-1]
  if channels in (2, 4):
    colour = array[..., :-1].repeat(3 if channels == 2 else 1, axis=-1)
    return _on_white(np.concatenate([colour, array[..., -1:]], axis=-1))
  return np.ascontiguousarray(array.repeat(3 // channels, axis=-1))
