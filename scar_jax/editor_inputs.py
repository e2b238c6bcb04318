"""What a caller of `Editor` may write, made uniform.

In: pictures, prompts, labels, masks and seeds as given: one or many, of any
kind. Out: checked lists of one length, and arrays of one padded batch. Called
by `editor.py`.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from scar_jax.annotate import make_annotator
from scar_jax.data.aspects import Shape, nearest_bucket
from scar_jax.data.controls import FROM_PHOTO, KINDS, canny, line_art
from scar_jax.data.geometry import Box, Size, letterbox_box
from scar_jax.data.masks import decode_mask, known_cells
from scar_jax.data.transforms import (
  decode,
  header_size,
  letterbox,
  to_float,
)
from scar_jax.orders.random import given_tokens
from scar_jax.parts import EditorConfig

SINGLE = (str, bytes, os.PathLike, Image.Image, np.ndarray)
_DRAWN = {'canny': canny, 'lineart': line_art}


class Cut(NamedTuple):
  """What a mask says: pixels drawn anew, tokens kept."""

  mask: Bool[np.ndarray, 'H W']
  keep: Bool[np.ndarray, ' N']


@dataclasses.dataclass
class Requests:
  """Checked requests; a list is empty where the model takes none of it.

  Attributes:
    count: how many.
    pictures: condition pictures, decoded where there are masks.
    texts: prompts.
    classes: labels.
    cuts: of the masks.
    boxes: of photos whose maps are the pictures.
    shapes: (height, width) of the canvas that each is made on.
  """

  count: int
  pictures: list[Any]
  texts: list[str | None]
  classes: list[int]
  cuts: list[Cut]
  boxes: list[Box]
  shapes: list[Shape]

  def frame(self, i: int) -> tuple[Box | None, Bool[np.ndarray, 'H W'] | None]:
    """Box and mask of request i, as `editor_outputs.framed` takes them."""
    return (
      self.boxes[i] if self.boxes else None,
      self.cuts[i].mask if self.cuts else None,
    )


def read(
  cfg: EditorConfig,
  images: Any,
  prompts: Any,
  labels: Any,
  masks: Any,
  control: str | None = None,
  weights: str | None = None,
) -> Requests:
  """Requests of the arguments of `Editor.__call__`.

  Raises:
    ValueError: see there.
  """
  if control is not None and masks is not None:
    raise ValueError(
      f'control={control!r} with masks; accepted: one of them (give the map as '
      'the image to draw a part of it anew)'
    )
  pictures, boxes = _listed(images, SINGLE), []
  texts = _listed(prompts, (str,))
  numbers = _listed(labels, (int, np.integer))
  count = max(len(pictures), len(texts), len(numbers))
  shapes = [cfg.square]
  if cfg.shapes and pictures:
    named = [(p, picture_name(p, i)) for i, p in enumerate(pictures)]
    sides = np.array([header_size(p, name) for p, name in named])
    shapes = [cfg.shapes[n] for n in nearest_bucket(cfg.shapes, sides)]
  shapes = shapes * count if len(shapes) == 1 else shapes
  if control is not None:
    drawn = [
      control_map(control, p, shape, weights, picture_name(p, i))
      for i, (p, shape) in enumerate(zip(pictures, shapes, strict=False))
    ]
    pictures = [made for made, _ in drawn]
    boxes = _spread(cfg, 'images', [box for _, box in drawn], count)
  pictures = _spread(cfg, 'images', pictures, count)
  classes = _spread(cfg, 'labels', numbers, count)
  _check_labels(cfg, classes)
  cuts: list[Cut] = []
  if masks is not None:
    listed = _spread(cfg, 'masks', _listed(masks, SINGLE), count)
    pictures, cuts = _cut(cfg, pictures, listed, shapes)
  texts = _spread(cfg, 'prompts', texts, count)
  return Requests(count, pictures, texts, classes, cuts, boxes, shapes)


def read_seeds(seed: int | Sequence[int], count: int) -> list[int]:
  """One for each picture, as unsigned 32-bit numbers.

  Raises:
    ValueError: another number of seeds than pictures.
  """
  if isinstance(seed, int | np.integer):
    return [(int(seed) + i) % 2**32 for i in range(count)]
  seeds = [int(s) % 2**32 for s in seed]
  if len(seeds) != count:
    raise ValueError(
      f'{len(seeds)} seeds for {count} pictures; accepted: one number, or '
      f'{count} (argument seed)'
    )
  return seeds


def control_map(
  kind: str, image: Any, size: Size, weights: str | None = None, name: str = ''
) -> tuple[UInt8[np.ndarray, 'h w 3'], Box]:
  """The map of a photo, on the model's canvas, and the box that it fills.

  Maps that need no network are drawn at the size that the model sees, as in
  training; those of networks at the photo's own, as `scar controls` does.

  Args:
    kind: of `data.controls.FROM_PHOTO`.
    image: photo.
    size: of the canvas, a side or (height, width), pixels.
    weights: see `annotate.make_annotator`.
    name: of the photo, for messages.

  Raises:
    ValueError: another kind, no weights, or an unreadable photo.
  """
  if kind not in FROM_PHOTO:
    more = ' is given as a picture, not drawn from one' if kind in KINDS else ''
    raise ValueError(
      f'control={kind!r}{more}; accepted: {", ".join(FROM_PHOTO)}'
    )
  photo = decode(image, name)
  if kind in _DRAWN:
    fitted, box = letterbox(photo, size)
    return _DRAWN[kind](fitted), box
  [(_, drawn)] = make_annotator(kind, weights, batch=1)([(0, photo)])
  return letterbox(decode(drawn), size)


def batches(requests: Requests, size: int) -> list[tuple[list[int], int]]:
  """Rows made together, and how many known tokens they start with.

  Requests share a batch only if they have one shape and start alike: so none
  depends on another.
  """
  groups: dict[tuple[Shape, int], list[int]] = {}
  for i in range(requests.count):
    given = 0
    if requests.cuts:
      keep = requests.cuts[i].keep
      given = given_tokens(int(keep.sum()), len(keep))
    groups.setdefault((requests.shapes[i], given), []).append(i)
  return [
    (some[start : start + size], given)
    for (_, given), some in groups.items()
    for start in range(0, len(some), size)
  ]


def arrays(
  requests: Requests, rows: Sequence[int], size: int, text: Any
) -> tuple[dict[str, Any], list[np.ndarray | None]]:
  """Arrays of one padded batch, and the pictures of its rows.

  Args:
    requests: all of them.
    rows: those of the batch, of one shape.
    size: of the batch.
    text: encoder of prompts, None without.
  """
  batch: dict[str, Any] = {}
  padded = pad(range(len(rows)), size)
  sources: list[np.ndarray | None] = [None] * len(rows)
  if requests.pictures:
    decoded = [
      decode(requests.pictures[i], picture_name(requests.pictures[i], i))
      for i in rows
    ]
    sources = [*decoded]
    canvas = requests.shapes[rows[0]]
    fitted = [to_float(letterbox(x, canvas)[0]) for x in decoded]
    batch['condition'] = np.stack([fitted[i] for i in padded])
  if text is not None:
    pairs = [text.encode(requests.texts[i], f'prompt {i}') for i in rows]
    batch['text'] = np.stack([pairs[i][0] for i in padded])
    batch['text_mask'] = np.stack([pairs[i][1] for i in padded])
  if requests.classes:
    numbers = [requests.classes[rows[i]] for i in padded]
    batch['label'] = np.asarray(numbers, np.int32)
  if requests.cuts:
    batch['keep'] = np.stack([requests.cuts[rows[i]].keep for i in padded])
  return batch, sources


def pad(rows: Sequence[int], size: int) -> list[int]:
  """The rows, the last one repeated up to `size`."""
  return [rows[min(i, len(rows) - 1)] for i in range(size)]


def buckets(batch: int, unit: int = 1) -> tuple[int, ...]:
  """Batch sizes that are compiled: doublings of `unit` below `batch`, and it.

  Args:
    batch: largest.
    unit: all are multiples of it, the devices of a mesh.
  """
  sizes, size = [], unit
  while size < batch:
    sizes.append(size)
    size *= 2
  return (*sizes, -(-batch // unit) * unit)


def picture_name(picture: Any, i: int, kind: str = 'image') -> str:
  """How an error names picture i of a request: its path, if it has one."""
  named = isinstance(picture, str | os.PathLike)
  return os.fspath(picture) if named else f'{kind} {i}'


def _listed(values: Any, single: tuple[type, ...]) -> list:
  if values is None:
    return []
  return [values] if isinstance(values, single) else list(values)


def _cut(
  cfg: EditorConfig, pictures: list, masks: list, shapes: list[Shape]
) -> tuple[list, list[Cut]]:
  """Decoded pictures, and what to keep of each on its canvas."""
  if not pictures:
    raise ValueError('masks without images; accepted: one image for each')
  arrays = [decode(p, picture_name(p, i)) for i, p in enumerate(pictures)]
  cuts = []
  for i, (array, mask) in enumerate(zip(arrays, masks, strict=True)):
    new = decode_mask(mask, array.shape[:2], picture_name(mask, i, 'mask'))
    box = letterbox_box(array.shape[:2], shapes[i])
    grid = cfg.sized(shapes[i]).model.grid
    cuts.append(Cut(new, known_cells(new, box, grid).reshape(-1)))
  return arrays, cuts


def _check_labels(cfg: EditorConfig, classes: Sequence[Any]) -> None:
  most = cfg.model.text.classes
  for i, label in enumerate(classes):
    whole = isinstance(label, int | np.integer) and label is not True
    if not whole or not 0 <= label < most:
      raise ValueError(
        f'label {i} is {label!r}; accepted: whole numbers from 0 to '
        f'{most - 1}, the classes of the model'
      )


def _spread(cfg: EditorConfig, name: str, values: list, count: int) -> list:
  """One value for each request; none where the model takes none."""
  model = cfg.model
  wanted = {
    'images': model.prefix.compress != 'off',
    'prompts': model.text.kind in ('byte', 't5'),
    'labels': model.text.kind == 'label',
    'masks': True,
  }[name]
  if not wanted and (name != 'images' or not values):
    return []  # without a prefix, a picture still gives the size
  if len(values) == 1:
    return values * count
  if name == 'prompts' and not values:
    return [''] * count
  if len(values) != count or not count:
    raise ValueError(
      f'{len(values)} {name} for {count} requests; accepted: 1 or '
      f'{count or "more"} (give every request its own, or one for all)'
    )
  return values
