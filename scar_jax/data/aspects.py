"""Shapes of pictures: from ratios to the sizes that batches are made in.

In: ratios as they are written, `16:9`, and the pixels of a square. Out: sizes
(height, width) of about that area, and the one that suits a picture. Called by
`config.check`, `data/buckets.py`, `train/inputs.py` and the task. Source: the
aspect-ratio buckets of NovelAI, with a rule of our own for the sizes.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

Shape = tuple[int, int]  # (height, width), pixels

_RATIO = re.compile(r'(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)')


def read_ratio(text: str) -> float:
  """Width / height of `16:9`.

  Raises:
    ValueError: not two positive numbers around a colon.
  """
  match = _RATIO.fullmatch(text.strip())
  width, height = (float(x) for x in match.groups()) if match else (0.0, 0.0)
  if not width or not height:
    raise ValueError(
      f'data.aspects={text!r} is no ratio; accepted: WIDTH:HEIGHT, such as '
      '1:1,4:3,16:9 (set --config.data.aspects)'
    )
  return width / height


def bucket_sizes(
  aspects: Sequence[str], image_size: int, step: int
) -> tuple[Shape, ...]:
  """The size of each ratio, in the order given.

  Cropping a picture to a size of another ratio loses a share of it, a size of
  less area a share of the tokens. The size kept is that of the greatest product
  of what is left of both, among those not above the area of the square; of
  several, the one that cuts least.

  Args:
    aspects: ratios, see `read_ratio`.
    image_size: side of the square, pixels.
    step: every side is a multiple of it, pixels.

  Raises:
    ValueError: no ratio, two ratios of one size, or a step that does not divide
      the square.
  """
  if step < 1 or image_size % step:
    raise ValueError(
      f'data.aspect_step={step} does not divide data.image_size={image_size}; '
      'accepted: a divisor, at best the pixels of a token times prefix.k (set '
      '--config.data.aspect_step)'
    )
  found: dict[Shape, str] = {}
  for aspect in aspects:
    rows, columns = _cells(read_ratio(aspect), image_size // step)
    size = rows * step, columns * step
    if size in found:
      raise ValueError(
        f'data.aspects: {found[size]} and {aspect} both give pictures of '
        f'{size[0]}x{size[1]} pixels (height x width); accepted: ratios '
        'further apart, or a smaller step (set --config.data.aspects or '
        f'data.aspect_step={step})'
      )
    found[size] = aspect
  return tuple(found)


def _cells(ratio: float, side: int) -> tuple[int, int]:
  """Rows and columns of at most `side**2` cells, about `ratio` wide."""
  if ratio < 1:
    columns, rows = _cells(1 / ratio, side)
    return rows, columns
  most = side * side

  def loss(shape: tuple[int, int]) -> tuple[float, float, int]:
    rows, columns = shape
    cut = abs(math.log(columns / rows / ratio))
    unused = math.log(most / (rows * columns))
    # More columns than the ratio asks for cut as much as they use.
    return round(cut + unused, 9), round(cut, 9), rows

  choices = {
    (rows, min(max(columns, 1), most // rows))
    for rows in range(1, side + 1)
    for columns in (math.floor(rows * ratio), math.ceil(rows * ratio))
  }
  return min(choices, key=loss)


def nearest_bucket(
  sizes: Sequence[Shape], pictures: Int[np.ndarray, 'n 2']
) -> Int[np.ndarray, ' n']:
  """Number of the size whose ratio is nearest to that of each picture.

  Args:
    sizes: (height, width) of each.
    pictures: (height, width) of each; zeros count as square.
  """
  height, width = np.maximum(pictures, 1).T.astype(np.float64)
  known = np.log([w / h for h, w in sizes])
  ratio = np.log(width / height)
  best = np.zeros(len(ratio), np.int64)
  least = np.full(len(ratio), np.inf)
  for number, value in enumerate(known):  # no table of n x sizes
    away = np.abs(ratio - value)
    closer = away < least - 1e-9
    best[closer], least[closer] = number, away[closer]
  return best


def check_aspects(config: Any) -> None:
  """Judges `data.aspects` of a whole config.

  Raises:
    ValueError: sizes that cannot be, or a run that has only squares.
  """
  data = config.data
  if not data.aspects:
    return
  bucket_sizes(data.aspects, data.image_size, data.aspect_step)
  wrong = None
  if config.task != 'scar':
    wrong = (
      f'task={config.task!r}, which trains on squares and then serves any '
      'shape; accepted: task scar'
    )
  elif config.order.name == 'scale':
    wrong = (
      "order.name='scale', whose scales are square; accepted: raster, random"
    )
  elif config.model.cond_dropout == 'joint':
    wrong = (
      "model.cond_dropout='joint', which learns a null prefix of one shape; "
      "accepted: 'text'"
    )
  elif data.mixture:
    wrong = 'data.mixture; accepted: one source (merge them into one jsonl)'
  elif data.source == 'cache':
    wrong = (
      'data.source=cache, whose rows have one shape; accepted: the source that '
      'it was made from'
    )
  if wrong:
    raise ValueError(
      f'data.aspects={",".join(data.aspects)} with {wrong} (set '
      '--config.data.aspects= for square crops)'
    )
