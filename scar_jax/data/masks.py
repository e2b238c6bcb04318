"""Masks of inpainting: which pixels and which tokens are drawn anew.

In: a picture of a mask, white where the image is drawn anew and black where it
is kept. Out: `[H, W]` of bool at the image's own size; which token cells hold
kept pixels only; the composite, where kept pixels are those of the source.
"""

import numpy as np
from jaxtyping import Bool, UInt8

from scar_jax.data.geometry import Box
from scar_jax.data.records import RecordError
from scar_jax.data.transforms import ImageLike, decode


def decode_mask(
  image: ImageLike, size: tuple[int, int], name: str = ''
) -> Bool[np.ndarray, 'H W']:
  """True where a mask asks for new pixels: from mid grey (128) to white.

  Transparency is white, as in every picture.

  Args:
    image: any picture, or an array such as bool `[H, W]`.
    size: (height, width) of the picture that it masks.
    name: what error messages call it; a path names itself.

  Raises:
    RecordError: unreadable, another size than the picture, nothing white.
  """
  bright = decode(image, name).mean(axis=-1, dtype=np.float32) >= 128
  if bright.shape != size:
    raise RecordError(
      name or 'mask',
      f'a mask of {bright.shape[1]}x{bright.shape[0]} pixels for a picture of '
      f'{size[1]}x{size[0]}; accepted: the size of the picture (upright)',
    )
  if not bright.any():
    raise RecordError(
      name or 'mask',
      'the mask has no white pixel, so all would be kept; accepted: white (128 '
      'or more) where the picture is drawn anew',
    )
  return bright


def known_cells(
  mask: Bool[np.ndarray, 'H W'], box: Box, grid: tuple[int, int]
) -> Bool[np.ndarray, 'h w']:
  """Token cells in which no pixel is drawn anew.

  Cells beside the picture follow its border, whose pixels they repeat.

  Args:
    mask: True where pixels are drawn anew.
    box: of the picture on the canvas that is cut into tokens.
    grid: (h, w) of the tokens.
  """
  rows = _spans(mask.shape[0], box.top, box.height, box.canvas[0], grid[0])
  columns = _spans(mask.shape[1], box.left, box.width, box.canvas[1], grid[1])
  return np.array([[not mask[r, c].any() for c in columns] for r in rows], bool)


def _spans(
  source: int, start: int, length: int, canvas: int, cells: int
) -> list[slice]:
  """Pixels of the source, along one axis, that each cell shows a part of.

  They lie at `start ... start + length` of the canvas.
  """
  side = canvas // cells
  edges = (np.arange(cells + 1) * side - start) * source
  first = np.clip(edges[:-1] // length, 0, source - 1)
  last = np.clip(-(-edges[1:] // length), first + 1, source)
  return [slice(int(a), int(b)) for a, b in zip(first, last, strict=True)]


def composite(
  made: UInt8[np.ndarray, 'H W 3'],
  source: UInt8[np.ndarray, 'H W 3'],
  mask: Bool[np.ndarray, 'H W'],
) -> UInt8[np.ndarray, 'H W 3']:
  """New pixels where the mask asks for them, else exactly the source's."""
  return np.where(mask[..., None], made, source)
