"""Procedural scenes: an unlimited data set whose truth is known exactly.

In: a kind, a split and an item number. Out: a `Record` made of flat shapes in
the cells of a grid, as an edit (source, instruction, result), a control map
with its picture, the same of one colour that is the class, or a picture alone.
An item is a pure function of (seed, split, number), so nothing is stored and
any worker can make any item.

The grid lines up with the tokens: at 32 pixels a cell is 8 x 8 pixels, which
is 2 x 2 tokens of a tokenizer with 4 x 4 patches.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from scar_jax.data.records import Record
from scar_jax.data.sources import scenes_text as words

SHAPES = ('square', 'diamond', 'triangle', 'cross')
COLOURS = {
  'red': (220, 40, 40),
  'green': (40, 170, 70),
  'blue': (40, 80, 220),
  'yellow': (245, 200, 30),
  'purple': (160, 50, 190),
  'black': (25, 25, 25),
}
SIZES = ('small', 'large')
BACKGROUNDS = ((240, 240, 240), (205, 230, 240), (245, 225, 205))
KINDS = ('recolour', 'move', 'add', 'remove', 'resize')
# In training those that name a place come three times as often: there are more
# places than colours, shapes and sizes, and each is learned for itself.
_TRAINED_KINDS = ('move', 'add') * 3 + ('recolour', 'remove', 'resize')
MAPS = ('edges', 'segmentation', 'depth')
SPLITS = ('train', 'seen', 'held_out')

# Colours of the classes in a segmentation map: corners of the colour cube that
# differ from every object colour, so a model cannot copy them.
SEGMENTS = ((255, 0, 255), (0, 255, 255), (255, 128, 0), (128, 255, 128))
# Grey of the three layers of a depth map: ground, small objects, large ones.
DEPTHS = (40, 150, 250)
# One in so many combinations is held out; see `is_held_out`.
HELD_OUT_SHARE = 8


class Item(NamedTuple):
  """One object; `row` and `col` count cells from the top left."""

  shape: str
  colour: str
  size: str
  row: int
  col: int

  @property
  def place(self) -> tuple[int, int]:
    return self.row, self.col


class Scene(NamedTuple):
  """Objects in reading order, on a background given by its number."""

  items: tuple[Item, ...]
  background: int = 0


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
  """What a scene may hold."""

  # 'edit', one of MAPS, 'control' (any map), 'class' (the same, all objects of
  # the colour that is the label: no map shows it), or 'image'
  kind: str = 'edit'
  split: str = 'train'  # 'train', 'seen' (new scenes), 'held_out' (new edits)
  image_size: int = 32  # pixels
  grid: int = 4  # cells along one side
  max_items: int = 3  # objects of a source scene, at least 1
  backgrounds: int = 1  # how many of BACKGROUNDS are used
  seed: int = 0
  length: int = 0  # items; 0 is 200,000 to train on, else 1,000

  def __post_init__(self):
    for name, accepted in (
      ('kind', ('edit', 'control', 'class', 'image', *MAPS)),
      ('split', SPLITS),
    ):
      value = getattr(self, name)
      if value not in accepted:
        raise ValueError(
          f'scenes: {name}={value!r} is unknown; accepted: '
          f'{", ".join(accepted)} (set data.{name})'
        )
    if self.image_size % self.grid or self.cell < 8 or self.cell % 2:
      raise ValueError(
        f'scenes: image_size={self.image_size} does not give cells of an even '
        f'number of pixels >= 8 in a grid of {self.grid}; accepted: multiples '
        f'of {2 * self.grid} from {8 * self.grid} (set data.image_size)'
      )
    if not 1 <= self.max_items < self.grid**2:
      raise ValueError(
        f'scenes: max_items={self.max_items}; accepted: 1 to '
        f'{self.grid**2 - 1}, one cell stays free'
      )
    if not 1 <= self.backgrounds <= len(BACKGROUNDS):
      raise ValueError(
        f'scenes: backgrounds={self.backgrounds}; accepted: 1 to '
        f'{len(BACKGROUNDS)}'
      )

  @property
  def cell(self) -> int:
    """Side of a cell in pixels."""
    return self.image_size // self.grid


def is_held_out(kind: str, item: Item) -> bool:
  """Whether this combination never occurs in training.

  The rule: the CRC-32 of 'kind/shape/colour/row/col' is divisible by
  `HELD_OUT_SHARE`. `item` is the object acted on as it stands before the edit
  (for `add`, the new object).
  """
  name = f'{kind}/{item.shape}/{item.colour}/{item.row}/{item.col}'
  return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


@functools.cache
def shape_mask(shape: str, size: str, cell: int) -> np.ndarray:
  """Bool [cell, cell], True inside; crisp, symmetric, centred."""
  side = cell if size == 'large' else 2 * round(cell * 0.375)
  v, u = np.mgrid[:side, :side] + 0.5 - side / 2
  half = side / 2
  thick = np.abs(v) - np.abs(u)
  inside = {
    'square': np.ones((side, side), bool),
    'diamond': np.abs(u) + np.abs(v) <= half,
    'triangle': np.abs(u) <= (v + half) / 2 + 0.5,
    # At least two pixels thick, or its colour is lost in 4 x 4 patches.
    'cross': (thick >= -(side // 8)) & (thick <= max(1, side // 8)),
  }[shape]
  return np.pad(inside, (cell - side) // 2)


@functools.cache
def contour_mask(shape: str, size: str, cell: int) -> np.ndarray:
  """Bool [cell, cell]: pixels of the shape with a side neighbour outside."""
  mask = shape_mask(shape, size, cell)
  wide = np.pad(mask, 1)
  inner = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
  return mask & ~inner


def _paint(scene, grid, cell, ground, fill, mask=shape_mask) -> np.ndarray:
  image = np.empty((grid * cell, grid * cell, 3), np.uint8)
  image[:] = ground
  for item in scene.items:
    y, x = item.row * cell, item.col * cell
    patch = image[y : y + cell, x : x + cell]
    patch[mask(item.shape, item.size, cell)] = fill(item)
  return image


def render(
  scene: Scene, grid: int = 4, cell: int = 8
) -> UInt8[np.ndarray, 'H W 3']:
  """The picture of a scene; no smoothing, so that truth is exact."""
  ground = BACKGROUNDS[scene.background]
  return _paint(scene, grid, cell, ground, lambda it: COLOURS[it.colour])


def control_map(
  scene: Scene, name: str, grid: int = 4, cell: int = 8
) -> UInt8[np.ndarray, 'H W 3']:
  """The 'edges', 'segmentation' or 'depth' map of a scene.

  Edges are white inner contours on black, segmentation has one colour of
  `SEGMENTS` per shape, depth one grey of `DEPTHS` per layer.
  """
  draw = functools.partial(_paint, scene, grid, cell)
  if name == 'edges':
    return draw(0, lambda _: 255, contour_mask)
  if name == 'segmentation':
    return draw(0, lambda it: SEGMENTS[SHAPES.index(it.shape)])
  if name == 'depth':
    return draw(DEPTHS[0], lambda it: DEPTHS[1 + SIZES.index(it.size)])
  raise ValueError(f'scenes: no map {name!r}; accepted: {", ".join(MAPS)}')


def _scene(rng: np.random.Generator, cfg: ScenesConfig) -> Scene:
  """Objects that differ in (shape, colour), each in a cell of its own."""
  count = int(rng.integers(1, cfg.max_items + 1))
  places = rng.choice(cfg.grid**2, count, replace=False)
  looks = rng.choice(len(SHAPES) * len(COLOURS), count, replace=False)
  names = tuple(COLOURS)
  items = [
    Item(
      SHAPES[look // len(names)],
      names[look % len(names)],
      SIZES[rng.integers(2)],
      *map(int, divmod(place, cfg.grid)),
    )
    for place, look in zip(places, looks, strict=True)
  ]
  return _ordered(items, int(rng.integers(cfg.backgrounds)))


def _ordered(items: Sequence[Item], background: int) -> Scene:
  return Scene(tuple(sorted(items, key=lambda it: it.place)), background)


def _in_one_colour(scene: Scene, colour: str) -> Scene:
  items = tuple(item._replace(colour=colour) for item in scene.items)
  return scene._replace(items=items)


def _edit(
  rng: np.random.Generator, kind: str, before: Scene, grid: int
) -> tuple[Item, Scene, str]:
  """`(object acted on, scene after, instruction)`."""
  pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
  taken = {it.place for it in before.items}
  if kind == 'add':
    looks = {(it.shape, it.colour) for it in before.items}
    free = [
      divmod(p, grid) for p in range(grid**2) if divmod(p, grid) not in taken
    ]
    new = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in looks]
    (shape, colour), (row, col) = pick(new), pick(free)
    item = Item(shape, colour, pick(SIZES), row, col)
    text = words.add(rng, item, grid)
    return item, _ordered([*before.items, item], before.background), text

  item = pick(before.items)
  rest = [it for it in before.items if it is not item]
  name = words.reference(rng, item, rest)
  if kind == 'remove':
    return item, _ordered(rest, before.background), words.remove(rng, name)
  if kind == 'recolour':
    used = {it.colour for it in rest if it.shape == item.shape}
    new = item._replace(
      colour=pick([c for c in COLOURS if c not in used | {item.colour}])
    )
    text = words.recolour(rng, name, new.colour)
  elif kind == 'resize':
    new = item._replace(size=SIZES[item.size == 'small'])
    text = words.resize(rng, name, new.size)
  else:
    place, text = words.move(rng, name, item, taken, grid)
    new = item._replace(row=place[0], col=place[1])
  return item, _ordered([*rest, new], before.background), text


class Scenes:
  """Random access to the items of one split; see `ScenesConfig`."""

  def __init__(self, cfg: ScenesConfig = ScenesConfig()):
    self.cfg = cfg

  def __len__(self) -> int:
    default = 200_000 if self.cfg.split == 'train' else 1_000
    return self.cfg.length or default

  def describe(self) -> str:
    cfg = self.cfg
    return (
      f'{len(self)} procedural scenes ({cfg.kind}, {cfg.split}), '
      f'{cfg.image_size} px, {cfg.grid} x {cfg.grid} cells'
    )

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Item `i`. `rng` is not used: every item is new already.

    `meta` has 'kind', 'before' (`Scene` or None), 'after' (`Scene`, the truth),
    'grid' and 'cells' (int [grid * grid], see `cell_classes`); for kind 'image'
    also 'labels', the class of every cell under 'cell_<row>_<col>'. `mask` is
    255 in the cells that the edit changes; `label` the colour of kind 'class'.

    Raises:
      IndexError: no such item.
    """
    del rng
    if not 0 <= i < len(self):
      raise IndexError(f'scenes: item {i} of {len(self)}')
    cfg = self.cfg
    seed = (cfg.seed, SPLITS.index(cfg.split), i)
    draw = np.random.default_rng(seed)
    if cfg.kind == 'edit':
      return self._edit_record(i, draw)
    scene, label = _scene(draw, cfg), None
    if cfg.kind == 'class':
      label = int(draw.integers(len(COLOURS)))
      scene = _in_one_colour(scene, tuple(COLOURS)[label])
    picture = render(scene, cfg.grid, cfg.cell)
    kind, condition, text = 'image', None, ''
    if cfg.kind != 'image':
      kind = cfg.kind if cfg.kind in MAPS else MAPS[i % len(MAPS)]
      condition = control_map(scene, kind, cfg.grid, cfg.cell)
      text = words.colours(it.colour for it in scene.items)
    record = self._record(i, kind, None, scene, picture, condition, text, None)
    return dataclasses.replace(record, label=label)

  def _edit_record(self, i: int, draw: np.random.Generator) -> Record:
    cfg = self.cfg
    kinds = _TRAINED_KINDS if cfg.split == 'train' else KINDS
    kind = kinds[i % len(kinds)]
    while True:
      before = _scene(draw, cfg)
      item, after, text = _edit(draw, kind, before, cfg.grid)
      if is_held_out(kind, item) == (cfg.split == 'held_out'):
        break
    source = render(before, cfg.grid, cfg.cell)
    target = render(after, cfg.grid, cfg.cell)
    changed = cell_classes(before, cfg.grid) != cell_classes(after, cfg.grid)
    mask = np.kron(changed.reshape(cfg.grid, -1), np.ones((cfg.cell,) * 2))
    mask = (255 * mask).astype(np.uint8)
    return self._record(i, kind, before, after, target, source, text, mask)

  def _record(self, i, kind, before, after, target, condition, text, mask):
    grid = self.cfg.grid
    cells = cell_classes(after, grid)
    meta: dict[str, Any] = dict(
      kind=kind, before=before, after=after, grid=grid, cells=cells
    )
    if kind == 'image':
      meta['labels'] = {
        f'cell_{n // grid}_{n % grid}': int(c) for n, c in enumerate(cells)
      }
    return Record(
      target=target,
      condition=condition,
      text=text,
      label=None,
      mask=mask,
      key=f'scenes/{self.cfg.split}/{i}',
      meta=meta,
    )


def make(data_cfg: Any, split: str) -> Scenes:
  """The source that `data.source='scenes'` names; `data.path` is not used."""
  return Scenes(
    ScenesConfig(
      kind=data_cfg.kind, split=split, image_size=data_cfg.image_size
    )
  )


NUM_CLASSES = 1 + len(SHAPES) * len(SIZES) * len(COLOURS)


def class_id(item: Item) -> int:
  """1 to NUM_CLASSES - 1: shape, size and colour; 0 is an empty cell."""
  look = SHAPES.index(item.shape) * len(SIZES) + SIZES.index(item.size)
  return 1 + look * len(COLOURS) + tuple(COLOURS).index(item.colour)


def cell_classes(scene: Scene, grid: int = 4) -> np.ndarray:
  """Int [grid * grid]: the class of every cell, row by row."""
  cells = np.zeros(grid * grid, np.int32)
  for item in scene.items:
    cells[item.row * grid + item.col] = class_id(item)
  return cells
