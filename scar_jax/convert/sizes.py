"""Reading sizes off the shapes of tensors.

In: name -> anything with a shape. Out: counts and dimensions, or errors that
say which tensor is missing. The `detect` functions of the families call it.
"""

import itertools
from collections.abc import Mapping
from typing import Any


def shape_of(state: Mapping[str, Any], name: str) -> tuple[int, ...]:
  """Shape of a tensor that the size of a model is read from.

  Raises:
    ValueError: it is missing.
  """
  shapes = getattr(state, 'shapes', state)
  if name not in shapes:
    raise ValueError(
      f'the size cannot be detected: 1 tensors missing: [{name!r}] among '
      f'{len(shapes)}, such as {list(shapes)[:3]}; accepted: a whole '
      'checkpoint of this family'
    )
  return tuple(shapes[name].shape)


def count(pattern: str, names: Mapping[str, Any]) -> int:
  """How many of `pattern` with 0, 1, 2, ... in place of `{}` there are."""
  present = (pattern.format(i) in names for i in itertools.count())
  return sum(1 for _ in itertools.takewhile(bool, present))


def width_multiples(
  pattern: str, state: Mapping[str, Any], first: int
) -> tuple[int, ...]:
  """Widths of the levels of a convolutional tokenizer, in units of the first.

  Args:
    pattern: name of a level's tensor, `{}` for its number.
    state: tensors or their shapes.
    first: the unit.

  Raises:
    ValueError: a width that is no multiple of it.
  """
  levels = range(count(pattern, state))
  widths = [shape_of(state, pattern.format(i))[0] for i in levels]
  if any(w % first for w in widths):
    raise ValueError(
      f'widths {widths} of the levels; accepted: multiples of the first, '
      f'{first}'
    )
  return tuple(w // first for w in widths)


def layers_of(prefix: str, names: Mapping[str, Any]) -> int:
  """One more than the highest number that follows `prefix`.

  A layer that lacks a tensor still counts, and its tensor is then missing.
  """
  found = (
    name.removeprefix(prefix).split('.', maxsplit=1)[0]
    for name in names
    if name.startswith(prefix)
  )
  return 1 + max((int(n) for n in found if n.isdecimal()), default=-1)


def heads_of_64(width: int) -> int:
  """Heads of 64 channels each.

  Raises:
    ValueError: no whole number of them.
  """
  if width % 64:
    raise ValueError(
      f'the number of heads cannot be detected: width {width} is no multiple '
      'of 64; accepted: a divisor of the width (set --heads)'
    )
  return width // 64


def public_heads(width: int, heads: int | None = None) -> int:
  """Heads of a vision transformer: 64 channels each, 80 in the huge ones.

  Raises:
    ValueError: the width is no multiple of 64 and `heads` is not given.
  """
  return heads or (16 if width == 1280 else heads_of_64(width))
