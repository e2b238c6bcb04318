"""Sizes and ranges: crop for training, letterbox for any picture, [-1, 1].

In and out: uint8 pictures `[H, W, 3]` and masks `[H, W]`. One policy for
picture, condition and mask alike. Training: shorter side resized, then a
square crop, the same for every picture of a record. Editing: `letterbox` fits
the whole picture, pads by repeating its edge, and remembers the box;
`unletterbox` gives exactly the asked size back.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image

FITS = ('crop', 'letterbox', 'stretch')
Size: TypeAlias = int | tuple[int, int]  # side, or (height, width)


@dataclasses.dataclass(frozen=True)
class Box:
  """Where a letterboxed picture lies, and the size it came from."""

  top: int
  left: int
  height: int
  width: int
  source: tuple[int, int]  # (height, width) before
  canvas: tuple[int, int]  # (height, width) after


def as_size(size: Size) -> tuple[int, int]:
  """(height, width) of a side or a pair."""
  pair = (size, size) if isinstance(size, int) else tuple(size)
  if len(pair) != 2 or min(pair) < 1:
    raise ValueError(f'size {size!r}; accepted: a side or (height, width) >= 1')
  return pair


def round_up(side: int, multiple: int) -> int:
  """The least multiple that holds `side`."""
  return -(-side // multiple) * multiple


def patch_grid(size: Size, patch: int) -> tuple[int, int]:
  """Exact number of patches (rows, columns).

  Raises:
    ValueError: a side is no multiple of the patch.
  """
  height, width = as_size(size)
  if height % patch or width % patch:
    near = round_up(height, patch), round_up(width, patch)
    raise ValueError(
      f'size {height}x{width} is no multiple of patch {patch}; the next that'
      f' is: {near[0]}x{near[1]}'
    )
  return height // patch, width // patch


def resize(
  image: UInt8[np.ndarray, 'H W 3'], size: Size
) -> UInt8[np.ndarray, 'h w 3']:
  """LANCZOS with antialiasing, half-pixel centres; unchanged if it fits."""
  height, width = as_size(size)
  if image.shape[:2] == (height, width):
    return image
  resized = Image.fromarray(image).resize(
    (width, height), Image.Resampling.LANCZOS
  )
  return np.asarray(resized)


def resize_nearest(
  labels: Shaped[np.ndarray, 'H W *channels'], size: Size
) -> Shaped[np.ndarray, 'h w *channels']:
  """Nearest neighbour: never a value that was not there."""
  height, width = as_size(size)
  rows = (np.arange(height) * 2 + 1) * labels.shape[0] // (2 * height)
  columns = (np.arange(width) * 2 + 1) * labels.shape[1] // (2 * width)
  return labels[rows[:, None], columns]


def _resize_any(array: np.ndarray, size: Size) -> np.ndarray:
  return resize(array, size) if array.ndim == 3 else resize_nearest(array, size)


def crop(
  pictures: Sequence[np.ndarray | None],
  size: Size,
  ratio: float = 1.0,
  rng: np.random.Generator | None = None,
) -> list[np.ndarray | None]:
  """The same crop of every picture and mask of one record.

  The first picture sets the geometry; others of another size are fitted to it
  (aspect ignored). It is scaled until it just covers `ratio * size`, then cut
  at a place drawn from `rng`, or centred (as the recipes of SCAR, EditAR and
  CAR: shorter side resized with rounding, LANCZOS).

  Args:
    pictures: uint8 `[H, W, 3]` or masks `[H, W]`; None stays None.
    size: of the result.
    ratio: >= 1; 1.125 with `rng` is the recipe for ImageNet.
    rng: of the place; None is the centre.
  """
  height, width = as_size(size)
  first = pictures[0]
  if first is None:
    raise ValueError('the first picture sets the crop and cannot be None')
  h, w = first.shape[:2]
  cover_h, cover_w = round(ratio * height), round(ratio * width)
  if h * cover_w <= w * cover_h:  # relative to the asked shape, too wide
    full = cover_h, max(cover_w, round(w * cover_h / h))
  else:
    full = max(cover_h, round(h * cover_w / w)), cover_w
  space = full[0] - height, full[1] - width
  if rng is None:
    top, left = round(space[0] / 2), round(space[1] / 2)
  else:
    top, left = (int(rng.integers(0, s + 1)) for s in space)

  def one(array: np.ndarray | None) -> np.ndarray | None:
    if array is None or array.shape[:2] == (height, width) == full == (h, w):
      return array
    array = _resize_any(array, full)
    return array[top : top + height, left : left + width]

  return [one(array) for array in pictures]


def fit_pictures(
  pictures: Mapping[str, UInt8[np.ndarray, 'H W 3']],
  size: Size,
  how: str = 'crop',
  ratio: float = 1.0,
  flip: float = 0.0,
  rng: np.random.Generator | None = None,
) -> dict[str, UInt8[np.ndarray, 'h w 3']]:
  """All pictures of one record in one size, by the same crop and mirroring.

  Args:
    pictures: the target first; it sets the geometry.
    size: of the result.
    how: 'crop'; 'letterbox', the whole picture, padded; or 'stretch', the
      whole picture, aspect ignored, others than the target by nearest
      neighbour (SCAR's reader of MultiGen, method 8.2).
    ratio: of `crop`.
    flip: chance that the record is mirrored.
    rng: of the place of the crop and of `flip`; None is the centre, unmirrored.
  """
  size = as_size(size)
  same = all(p.shape[:2] == size for p in pictures.values())
  if same and (ratio == 1 or how != 'crop'):
    fitted = list(pictures.values())
  elif how == 'letterbox':
    box = letterbox_box(next(iter(pictures.values())).shape[:2], size)
    fitted = [letterbox_like(p, box) for p in pictures.values()]
  elif how == 'stretch':
    target, *others = pictures.values()
    fitted = [resize(target, size), *(resize_nearest(p, size) for p in others)]
  else:
    place = rng if ratio > 1 else None
    fitted = crop(list(pictures.values()), size, ratio, place)
  if rng is not None and flip and rng.random() < flip:
    fitted = [p[:, ::-1] for p in fitted if p is not None]
  return {
    name: picture
    for name, picture in zip(pictures, fitted, strict=True)
    if picture is not None
  }


def letterbox(
  image: Shaped[np.ndarray, 'H W *channels'], size: Size, fill: str = 'edge'
) -> tuple[Shaped[np.ndarray, 'h w *channels'], Box]:
  """The whole picture fitted into `size`, centred, and the box it fills.

  Args:
    image: picture, or mask `[H, W]` (nearest; padded with 0).
    size: of the result.
    fill: 'edge' repeats the border pixels, 'white' paints 255.
  """
  box = letterbox_box(image.shape[:2], size)
  return letterbox_like(image, box, fill), box


def letterbox_box(source: tuple[int, ...], size: Size) -> Box:
  """The box that a picture of (height, width) `source` fills in `size`."""
  canvas = as_size(size)
  scale = min(canvas[0] / source[0], canvas[1] / source[1])
  height = min(canvas[0], max(1, round(source[0] * scale)))
  width = min(canvas[1], max(1, round(source[1] * scale)))
  return Box(
    top=(canvas[0] - height) // 2,
    left=(canvas[1] - width) // 2,
    height=height,
    width=width,
    source=(source[0], source[1]),
    canvas=canvas,
  )


def letterbox_like(
  image: Shaped[np.ndarray, 'H W *channels'], box: Box, fill: str = 'edge'
) -> Shaped[np.ndarray, 'h w *channels']:
  """A condition or mask into the box of its picture."""
  if fill not in ('edge', 'white'):
    raise ValueError(f'fill={fill!r}; accepted: edge, white')
  if image.shape[:2] != box.source:
    image = _resize_any(image, box.source)
  image = _resize_any(image, (box.height, box.width))
  below = box.canvas[0] - box.height - box.top
  right = box.canvas[1] - box.width - box.left
  pad = [(box.top, below), (box.left, right)]
  if image.ndim == 2:
    return np.pad(image, pad)
  pad.append((0, 0))
  if fill == 'edge':
    return np.pad(image, pad, mode='edge')
  return np.pad(image, pad, constant_values=255)


def unletterbox(
  image: Shaped[np.ndarray, 'h w *channels'], box: Box, size: Size | None = None
) -> Shaped[np.ndarray, 'H W *channels']:
  """The inverse: exactly `size`, or the size before `letterbox`.

  Raises:
    ValueError: `image` is not of the canvas's size.
  """
  if image.shape[:2] != box.canvas:
    raise ValueError(f'image is {image.shape[:2]}, its box is of {box.canvas}')
  inside = image[box.top : box.top + box.height]
  inside = inside[:, box.left : box.left + box.width]
  return _resize_any(inside, box.source if size is None else size)


def to_float(image: UInt8[np.ndarray, '...']) -> Float32[np.ndarray, '...']:
  """uint8 to [-1, 1]: 0 is -1, 255 is 1."""
  return image.astype(np.float32) * np.float32(2 / 255) - np.float32(1)


def to_uint8(image: Any) -> UInt8[np.ndarray, '...']:
  """[-1, 1] to uint8, rounded to the nearest; clamps what lies outside.

  Raises:
    ValueError: a value is not finite.
  """
  image = np.asarray(image, np.float32)
  if not np.isfinite(image).all():
    raise ValueError('picture holds NaN or infinite values, not [-1, 1]')
  return np.rint(np.clip((image + 1) * 127.5, 0, 255)).astype(np.uint8)
