"""Instructions of the procedural scenes, and the names of cells.

In: the objects of a scene and what happens to one of them. Out: an English
sentence of at most `MAX_TEXT` bytes that fits exactly one outcome. Cells are
named like the squares of a chess board read from the top: letter for the
column, number for the row, 'a1' at the top left; corners have names, too.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

# One byte less than 40, so that 40 tokens hold the end mark as well.
MAX_TEXT = 39

STEPS = {'up': (-1, 0), 'down': (1, 0), 'left': (0, -1), 'right': (0, 1)}

RECOLOUR = (
  'make {name} {colour}',
  'paint {name} {colour}',
  'turn {name} {colour}',
  'change {name} to {colour}',
)
RESIZE = {
  'large': ('make {name} large', 'enlarge {name}', 'make {name} bigger'),
  'small': ('make {name} small', 'shrink {name}', 'make {name} smaller'),
}
REMOVE = ('remove {name}', 'delete {name}', 'erase {name}')
MOVE_STEP = ('move {name} {step}', 'shift {name} {step}')
MOVE_TO = ('move {name} to {place}', 'put {name} at {place}')
ADD = (
  'add a {size} {colour} {shape} at {place}',
  'draw a {size} {colour} {shape} at {place}',
)


def _fill(rng: np.random.Generator, templates: Sequence[str], **values) -> str:
  """One of the templates that stay short enough with these values."""
  texts = [t.format(**values) for t in templates]
  texts = [t for t in texts if len(t) <= MAX_TEXT]
  return texts[rng.integers(len(texts))]


def cell_names(row: int, col: int, grid: int) -> list[str]:
  """All names of a cell, the one that always exists first."""
  names = [f'{chr(ord("a") + col)}{row + 1}']
  vertical = {0: 'top', grid - 1: 'bottom'}.get(row)
  horizontal = {0: 'left', grid - 1: 'right'}.get(col)
  if vertical and horizontal:
    names.append(f'{vertical} {horizontal}')
  return names


def reference(rng: np.random.Generator, item: Any, rest: Sequence[Any]) -> str:
  """A description that fits `item` and none of the `rest`.

  Colour and shape always do, since scenes hold no two alike; shape alone or
  colour alone are used now and then where they are enough.
  """
  draw = rng.random()
  if draw < 0.2 and all(it.shape != item.shape for it in rest):
    return f'the {item.shape}'
  if draw > 0.8 and all(it.colour != item.colour for it in rest):
    return f'the {item.colour} one'
  return f'the {item.colour} {item.shape}'


def recolour(rng: np.random.Generator, name: str, colour: str) -> str:
  return _fill(rng, RECOLOUR, name=name, colour=colour)


def resize(rng: np.random.Generator, name: str, size: str) -> str:
  return _fill(rng, RESIZE[size], name=name)


def remove(rng: np.random.Generator, name: str) -> str:
  return _fill(rng, REMOVE, name=name)


def add(rng: np.random.Generator, item: Any, grid: int) -> str:
  names = cell_names(item.row, item.col, grid)
  templates = [t.replace('{place}', name) for t in ADD for name in names]
  return _fill(
    rng, templates, size=item.size, colour=item.colour, shape=item.shape
  )


def move(
  rng: np.random.Generator,
  name: str,
  item: Any,
  taken: Collection[tuple[int, int]],
  grid: int,
) -> tuple[tuple[int, int], str]:
  """`(target cell, instruction)`; one step when a side is free, or anywhere."""
  steps = [
    (step, (item.row + dy, item.col + dx))
    for step, (dy, dx) in STEPS.items()
    if 0 <= item.row + dy < grid
    and 0 <= item.col + dx < grid
    and (item.row + dy, item.col + dx) not in taken
  ]
  if steps and rng.random() < 0.5:
    step, place = steps[rng.integers(len(steps))]
    return place, _fill(rng, MOVE_STEP, name=name, step=step)
  free = [divmod(p, grid) for p in range(grid**2)]
  free = [p for p in free if p not in taken]
  place = free[rng.integers(len(free))]
  templates = [
    t.replace('{place}', where)
    for t in MOVE_TO
    for where in cell_names(*place, grid)
  ]
  return place, _fill(rng, templates, name=name)


def colours(names: Iterable[str]) -> str:
  """The colours of a control map's objects, in reading order."""
  return ', '.join(names)
