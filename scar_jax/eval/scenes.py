"""Scores of scene pictures: is every object what and where it should be?

In: pictures that a model made and the records they answer. Out: the class of
every cell, read from the picture alone, and the share of pictures in which all
cells are right, per kind of instruction, beside what the tokenizer's own
reconstruction of the truth reaches (the ceiling of any model that uses it).
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from scar_jax.data.records import Record
from scar_jax.data.sources import scenes

# A cell whose root mean square distance to the nearest class is larger, in
# grey levels of 255, shows no object of the vocabulary: smears do not count as
# what they resemble most. Noise of 30 grey levels and a Gaussian blur of half
# a pixel (8-pixel cells) stay below it.
UNCLEAR = -1
MAX_RMSE = 40.0
# What a picture equal to the truth scores; JSON has no infinity.
MAX_PSNR = 99.0


@functools.cache
def _templates(cell: int) -> tuple[np.ndarray, np.ndarray]:
  """`(pixels [M, cell * cell * 3], class [M])` over all backgrounds."""
  pixels, classes = [], []
  for background in range(len(scenes.BACKGROUNDS)):
    scene = scenes.Scene((), background)
    pixels.append(scenes.render(scene, 1, cell))
    classes.append(0)
    for shape in scenes.SHAPES:
      for size in scenes.SIZES:
        for colour in scenes.COLOURS:
          item = scenes.Item(shape, colour, size, 0, 0)
          pixels.append(scenes.render(scene._replace(items=(item,)), 1, cell))
          classes.append(scenes.class_id(item))
  flat = np.stack(pixels).reshape(len(pixels), -1).astype(np.float64)
  return flat, np.asarray(classes, np.int32)


def closest_classes(cell: int) -> float:
  """Smallest RMS distance of two classes, in grey levels."""
  pixels, classes = _templates(cell)
  distance = _squared(pixels, pixels) / pixels.shape[1]
  other = classes[:, None] != classes[None]
  return float(np.sqrt(distance[other].min()))


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Squared Euclidean distances [n, m] of the rows of `a` and `b`."""
  squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
  return np.maximum(squares, 0)


def classify(
  images: UInt8[np.ndarray, 'B H W 3'],
  grid: int = 4,
  max_rmse: float = MAX_RMSE,
) -> Int[np.ndarray, 'B cells']:
  """Class of every cell by its nearest template, `UNCLEAR` where none is near.

  Classes are those of `data.sources.scenes.class_id`, cells go row by row.

  Raises:
    ValueError: the side is no multiple of the grid.
  """
  images = np.asarray(images)
  if images.ndim != 4 or images.shape[1] != images.shape[2]:
    raise ValueError(
      f'scenes: pictures of shape {images.shape}; accepted: [B, H, H, 3]'
    )
  batch, side = images.shape[:2]
  if side % grid:
    raise ValueError(
      f'scenes: pictures of {side} pixels do not divide into {grid} cells; '
      f'accepted: multiples of {grid} (set data.image_size)'
    )
  cell = side // grid
  cells = images.reshape(batch, grid, cell, grid, cell, 3)
  cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch * grid**2, -1)
  pixels, classes = _templates(cell)
  distance = _squared(cells.astype(np.float64), pixels)
  nearest = distance.argmin(1)
  rmse = np.sqrt(distance.min(1) / pixels.shape[1])
  found = np.where(rmse <= max_rmse, classes[nearest], UNCLEAR)
  return found.reshape(batch, grid**2)


def _psnr(images: np.ndarray, truth: np.ndarray, keep: np.ndarray) -> float:
  """PSNR in dB over the pixels to keep, pooled over all pictures."""
  error = (images.astype(np.float64) - truth) ** 2
  count = keep.sum() * 3
  mse = (error * keep[..., None]).sum() / max(count, 1)
  if mse == 0:
    return MAX_PSNR
  return float(min(MAX_PSNR, 10 * np.log10(255**2 / mse)))


def _measure(
  images: np.ndarray, records: Sequence[Record], prefix: str
) -> tuple[dict[str, Any], np.ndarray]:
  truth = np.stack([r.target for r in records])
  images = np.asarray(images)
  if images.shape != truth.shape or images.dtype != np.uint8:
    raise ValueError(
      f'scenes: {prefix or "result"} pictures are {images.dtype} '
      f'{images.shape}; accepted: uint8 {truth.shape}, one per record'
    )
  grid = records[0].meta['grid']
  right = classify(images, grid) == np.stack([r.meta['cells'] for r in records])
  changed = np.stack(
    [
      np.zeros(t.shape[:2], bool) if r.mask is None else r.mask > 0
      for r, t in zip(records, truth, strict=True)
    ]
  )
  edited = _changed_cells(changed, grid)
  exact = right.all(1)
  return {
    f'{prefix}exact': float(exact.mean()),
    f'{prefix}changed_exact': float((right | ~edited).all(1).mean()),
    f'{prefix}kept_exact': float((right | edited).all(1).mean()),
    f'{prefix}background_psnr': _psnr(images, truth, ~changed),
  }, exact


def _changed_cells(mask: np.ndarray, grid: int) -> np.ndarray:
  batch, side = mask.shape[:2]
  blocks = mask.reshape(batch, grid, side // grid, grid, side // grid)
  return blocks.any((2, 4)).reshape(batch, -1)


def score_scenes(
  results: UInt8[np.ndarray, 'B H W 3'],
  records: Sequence[Record],
  reconstructions: UInt8[np.ndarray, 'B H W 3'] | None = None,
) -> dict[str, Any]:
  """Judges every picture against the truth of its record.

  Args:
    results: the model's pictures, in the order of `records`.
    records: from `data.sources.scenes`.
    reconstructions: the truth after the tokenizer's encoder and decoder.

  Returns:
    Shares from 0 to 1 and PSNRs in dB: 'n', 'exact' (every cell has the right
    shape, colour, size or is empty), 'changed_exact' (the cells that the edit
    changes), 'kept_exact' (all other cells), 'background_psnr' (pixels outside
    the changed cells), the same with `tokenizer_` in front if reconstructions
    are given, and 'kinds': per kind 'n', 'exact' and 'tokenizer_exact'.

  Raises:
    ValueError: no records, or pictures that do not fit them.
  """
  if not records:
    raise ValueError('scenes: no records to score; accepted: at least one')
  scores, exact = _measure(results, records, '')
  per_kind = {'exact': exact}
  if reconstructions is not None:
    more, exact = _measure(reconstructions, records, 'tokenizer_')
    scores |= more
    per_kind['tokenizer_exact'] = exact
  kinds = np.asarray([r.meta['kind'] for r in records])
  return {
    'n': len(records),
    **scores,
    'kinds': {
      str(kind): {
        'n': int((kinds == kind).sum()),
        **{k: float(v[kinds == kind].mean()) for k, v in per_kind.items()},
      }
      for kind in np.unique(kinds)
    },
  }
