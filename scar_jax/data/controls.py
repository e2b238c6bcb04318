"""Control maps: depth, edges, line art, segments, as pictures that condition.

In: a picture, or a map of one channel in any stored depth. Out: uint8 RGB
`[H, W, 3]`, grey repeated. Nothing here divides by what may be zero. What a
network draws (soft edges, depth) comes from `scar controls` as files, which
`Controlled` gives to the records of a source. Source: method 8.1, 8.2.
"""

import dataclasses
import functools
import os
import pathlib

import numpy as np
from jaxtyping import Int, Num, UInt8

from scar_jax.data.records import Record, RecordError, Source, sized
from scar_jax.data.transforms import (
  ImageLike,
  decode,
  load_image,
  to_byte_range,
)
from scar_jax.extras import require

DEPTH_RULES = ('stored', 'minmax')
# Kind -> what it is made from. Those of a 'picture' are drawn while training.
KINDS = {
  'canny': 'picture',
  'lineart': 'picture',
  'hed': 'network',
  'sketch': 'network',
  'depth': 'network',
  'seg': 'labels',
}
# Those that are made from a photo alone.
FROM_PHOTO = tuple(kind for kind, of in KINDS.items() if of != 'labels')
# Endings that a map does not keep.
PICTURES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')


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
  image: UInt8[np.ndarray, 'H W 3'],
  low: int = 100,
  high: int = 200,
) -> UInt8[np.ndarray, 'H W 3']:
  """White edges on black, by OpenCV's detector.

  Args:
    image: picture.
    low: lower threshold; both defaults are those of ControlAR and CAR.
    high: upper threshold.

  Raises:
    ValueError: OpenCV is not installed.
  """
  cv2 = require('cv2', 'data')
  edges = cv2.Canny(np.ascontiguousarray(image), low, high)
  return np.repeat(edges[..., None], 3, axis=-1)


def thresholds(rng: np.random.Generator | None) -> dict[str, int]:
  """Arguments of `canny` in training; none without a generator.

  Low from 50 to 150 and high 50 to 150 above, around the fixed ones, in the
  manner of ControlNet.
  """
  if rng is None:
    return {}
  low, gap = rng.integers(50, 151, 2)
  return {'low': int(low), 'high': int(low + gap)}


def line_art(
  image: UInt8[np.ndarray, 'H W 3'], width: float = 1.5, strength: float = 20.0
) -> UInt8[np.ndarray, 'H W 3']:
  """Soft white lines on black where a picture is darker than around.

  A difference of two Gaussians of the lightness: the classical stand-in for the
  line-art generator of ControlNet, whose weights are not public packages.

  Args:
    image: picture.
    width: of a line, pixels (sigma of the narrow Gaussian).
    strength: grey levels of a line for each of difference.

  Raises:
    ValueError: OpenCV is not installed.
  """
  cv2 = require('cv2', 'data')
  grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
  near, far = (
    cv2.GaussianBlur(grey.astype(np.float32), (0, 0), sigma)
    for sigma in (width, 1.6 * width)
  )
  # The first levels are noise and slow shading.
  lines = np.clip(strength * (far - near - 2.0), 0, 255)
  return np.repeat(np.rint(lines).astype(np.uint8)[..., None], 3, axis=-1)


def sketch(
  edges: UInt8[np.ndarray, 'H W'], keep: int = 127, width: float = 3.0
) -> UInt8[np.ndarray, 'H W']:
  """Strokes of one width out of soft edges, as ControlNet makes scribbles.

  Ridges of the blurred edges, made wide again by a blur and a threshold.

  Args:
    edges: soft edges, such as HED's.
    keep: ridges that are brighter stay.
    width: sigma of both blurs, pixels.

  Returns:
    0 or 255.
  """
  cv2 = require('cv2', 'data')
  soft = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), width)
  line = np.zeros((3, 3), np.uint8)
  line[1] = 1
  directions = (line, line.T, np.eye(3, dtype=np.uint8))
  directions += (np.ascontiguousarray(directions[2][::-1]),)
  # A ridge is the largest of its neighbours across at least one direction.
  ridge = np.any([cv2.dilate(soft, d) == soft for d in directions], axis=0)
  thin = np.where(ridge & (soft > keep), 255, 0).astype(np.uint8)
  wide = cv2.GaussianBlur(thin, (0, 0), width)
  return np.where(wide > 4, 255, 0).astype(np.uint8)


def segments(
  labels: Int[np.ndarray, 'H W'] | UInt8[np.ndarray, 'H W'], name: str = ''
) -> UInt8[np.ndarray, 'H W 3']:
  """A colour for each class of a label map; 0 is black.

  The colours of the Pascal VOC rule: bit i of a label goes to bit 7 - i // 3 of
  red, green or blue in turn.

  Raises:
    RecordError: labels outside 0 to 255.
  """
  if labels.ndim != 2 or labels.dtype.kind not in 'iu' or not labels.size:
    raise RecordError(
      name or 'label map',
      f'{labels.dtype} {labels.shape}; accepted: whole numbers [H, W]',
    )
  if labels.min() < 0 or labels.max() > 255:
    raise RecordError(
      name or 'label map',
      f'labels from {labels.min()} to {labels.max()}; accepted: 0 to 255',
    )
  ids = np.arange(256)
  palette = np.zeros((256, 3), np.uint8)
  for bit in range(8):
    palette[:, bit % 3] |= ((ids >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
  return palette[labels]


class Controlled:
  """A source whose records get a control map as their condition.

  Args:
    source: records with a target.
    kinds: of `KINDS`; a record has one of them, drawn anew in training.
    path: folder with a folder of maps for each kind; '' draws all of them.

  Raises:
    ValueError: an unknown kind, or one whose maps are not there.
  """

  def __init__(self, source: Source, kinds: tuple[str, ...], path: str = ''):
    self.source, self.kinds, self.path = source, kinds, path
    wrong = [k for k in kinds if k not in KINDS]
    if wrong:
      raise ValueError(
        f'data.control={wrong[0]!r}; accepted: {", ".join(KINDS)} '
        '(set --config.data.control)'
      )
    for kind in kinds:
      if KINDS[kind] != 'picture' and not self._has_maps(kind):
        raise ValueError(
          f'data.control={kind!r} needs maps, and data.control_path={path!r} '
          f'has no folder {kind!r}; accepted: a folder with one, made by scar '
          f'controls --kind={kind} (set --config.data.control_path)'
        )

  def _has_maps(self, kind: str) -> bool:
    return bool(self.path) and (pathlib.Path(self.path) / kind).is_dir()

  def __len__(self) -> int:
    return len(self.source)

  def describe(self) -> str:
    places = [
      f'{k} ({"stored" if self._has_maps(k) else "drawn"})' for k in self.kinds
    ]
    return f'{self.source.describe()}; control {", ".join(places)}'

  def size(self, i: int) -> tuple[int, int]:
    """(height, width) of the target of record `i`."""
    return sized(self.source).size(i)

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Record `i`; without a generator the kinds take turns.

    Raises:
      RecordError: of the source, or no readable map.
    """
    record = self.source.load(i, rng)
    n = len(self.kinds)
    kind = self.kinds[i % n if rng is None else int(rng.integers(n))]
    if not self._has_maps(kind):
      make = functools.partial(canny, **thresholds(rng))
      return dataclasses.replace(
        record, condition=None, draw=make if kind == 'canny' else line_art
      )
    try:
      found = decode(pathlib.Path(self.path) / kind / map_name(record.key))
    except RecordError as error:
      raise RecordError(
        record.key, f'{kind} map {error.key}: {error.reason}'
      ) from None
    return dataclasses.replace(record, condition=found)


def map_name(key: str) -> str:
  """Path of the map of a record, or of a picture, below its kind's folder.

  The key with the ending .png in place of a picture's own; what would lead out
  of the folder is dropped.
  """
  parts = [p for p in pathlib.PurePosixPath(key).parts if p not in ('/', '..')]
  stem, ending = os.path.splitext('/'.join(parts))
  return f'{stem if ending.lower() in PICTURES else "/".join(parts)}.png'
