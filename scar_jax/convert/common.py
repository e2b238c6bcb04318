"""Name tables between torch state dicts and flax parameters, both ways.

In: tensors under torch names as numpy arrays, a table of `Entry`, the abstract
parameters. Out: the parameters (`assemble`) or the tensors (`disassemble`):
each leaf filled once, each tensor used once, errors that list everything that
does not fit. Sources that hold `{i}` are one tensor for each stacked layer.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from scar_jax.sharding import path_name, unbox
from scar_jax.types import PyTree

RULES = ('same', 'flat', 'linear', 'conv')


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one parameter comes from.

  Attributes:
    path: of our parameter, `a/b/c`.
    sources: torch names; several are joined along their first axis.
    rule: 'linear' ([out, in] to [*in, *out]), 'conv' (OIHW to HWIO), 'flat'
      (a vector to several axes) or 'same' (equal but for axes of size 1).
    in_dims: input axes of our kernel, for 'linear'.
    lead: axes of size 1 in front of the torch tensor, for 'same'.
    tail: axes of size 1 at its end, for 'same'.
  """

  path: str
  sources: tuple[str, ...]
  rule: str = 'same'
  in_dims: int = 1
  lead: int = 0
  tail: int = 0

  def __post_init__(self):
    if self.rule not in RULES:
      raise ValueError(
        f'{self.path}: rule {self.rule!r}; accepted: {", ".join(RULES)}'
      )

  @property
  def stacked(self) -> bool:
    """One tensor per layer, stacked along the first axis of ours."""
    return '{i}' in self.sources[0]

  def names(self, i: int | None = None) -> list[str]:
    """Torch names, of layer i if stacked."""
    return [s.replace('{i}', str(i)) for s in self.sources]


def affine(path: str, source: str) -> list[Entry]:
  """Scale and bias of a norm."""
  return [
    Entry(f'{path}/scale', (f'{source}.weight',)),
    Entry(f'{path}/bias', (f'{source}.bias',)),
  ]


def linear(
  path: str, *sources: str, bias: bool = True, in_dims: int = 1
) -> list[Entry]:
  """Kernel and bias of a linear map."""
  kernel = tuple(f'{s}.weight' for s in sources)
  entries = [Entry(f'{path}/kernel', kernel, 'linear', in_dims)]
  if bias:
    biases = tuple(f'{s}.bias' for s in sources)
    entries.append(Entry(f'{path}/bias', biases, 'flat'))
  return entries


def conv(path: str, source: str, bias: bool = True) -> list[Entry]:
  """Kernel and bias of a 2D convolution."""
  entries = [Entry(f'{path}/kernel', (f'{source}.weight',), 'conv')]
  if bias:
    entries.append(Entry(f'{path}/bias', (f'{source}.bias',)))
  return entries


def _padded(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
  return (1,) * entry.lead + shape + (1,) * entry.tail


def _to_ours(entry: Entry, value: np.ndarray, shape: tuple[int, ...]):
  """The value in our shape, or None if it cannot be that parameter."""
  if entry.rule == 'conv':
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
  elif entry.rule == 'linear':
    rows = int(np.prod(shape[: entry.in_dims]))
    columns = int(np.prod(shape[entry.in_dims :]))
    if value.shape == (columns, rows):
      value = value.T.reshape(shape)
  elif entry.rule == 'flat':
    if value.ndim == 1 and value.size == int(np.prod(shape)):
      value = value.reshape(shape)
  elif value.shape == _padded(entry, shape):
    value = value.reshape(shape)
  return value if value.shape == shape else None


def _to_torch(entry: Entry, value: np.ndarray) -> np.ndarray:
  """The inverse of `_to_ours`."""
  if entry.rule == 'conv':
    return value.transpose(3, 2, 0, 1)
  if entry.rule == 'linear':
    rows = int(np.prod(value.shape[: entry.in_dims]))
    return value.reshape(rows, -1).T
  if entry.rule == 'flat':
    return value.reshape(-1)
  return value.reshape(_padded(entry, value.shape))


def flatten(tree: PyTree) -> dict[str, Any]:
  """Leaves by path `a/b/c`, logical-axis boxes removed."""
  flat = jax.tree_util.tree_flatten_with_path(unbox(tree))[0]
  return {path_name(path): leaf for path, leaf in flat}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`, for dicts."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def _check_table(entries: Sequence[Entry], paths: Iterable[str]) -> None:
  """A table that does not name each leaf once is our mistake."""
  named = [e.path for e in entries]
  twice = sorted({p for p in named if named.count(p) > 1})
  absent = sorted(set(paths) - set(named))
  unknown = sorted(set(named) - set(paths))
  if twice or absent or unknown:
    raise ValueError(
      f'the name table and the parameters disagree: named twice {twice}, '
      f'not named {absent}, unknown {unknown}; accepted: each parameter once '
      '(change the table, or the model section of the config)'
    )


def _refuse(missing: list[str], extra: list[str], wrong: list[str]) -> None:
  if missing or extra or wrong:
    raise ValueError(
      f'{len(missing)} tensors missing: {missing}; {len(extra)} unexpected: '
      f'{extra}; {len(wrong)} of wrong shape: {wrong}; accepted: the tensors '
      'of this model and size (set --config.model, or give another file)'
    )


def assemble(
  entries: Iterable[Entry],
  state: Mapping[str, np.ndarray],
  abstract: PyTree,
  skip: Sequence[str] = (),
) -> dict[str, Any]:
  """Parameters like `abstract`, in float32.

  Args:
    entries: the table; names every leaf of `abstract`.
    state: torch tensors.
    abstract: shapes of the parameters, boxed or not.
    skip: regular expressions of tensor names that are left out on purpose.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  entries, leaves = list(entries), flatten(abstract)
  _check_table(entries, leaves)
  missing: list[str] = []
  wrong: list[str] = []
  used: set[str] = set()

  def read(entry: Entry, i: int | None, shape: tuple[int, ...]):
    names = entry.names(i)
    absent = [n for n in names if n not in state]
    missing.extend(absent)
    used.update(names)
    if absent:
      return None
    parts = [np.asarray(state[n], np.float32) for n in names]
    # Parts that do not fit each other cannot be joined: report their shapes.
    fit = len({p.shape[1:] for p in parts}) == 1 and all(p.ndim for p in parts)
    value = parts[0]
    if len(parts) > 1:
      value = np.concatenate(parts) if fit else None
    fitted = None if value is None else _to_ours(entry, value, shape)
    if fitted is None:
      given = ' + '.join(str(p.shape) for p in parts)
      wrong.append(f'{" + ".join(names)} {given} for {entry.path} {shape}')
    return fitted

  flat: dict[str, Any] = {}
  for entry in entries:
    shape = tuple(leaves[entry.path].shape)
    if entry.stacked:
      layers = [read(entry, i, shape[1:]) for i in range(shape[0])]
      good = [x for x in layers if x is not None]
      flat[entry.path] = np.stack(good) if len(good) == len(layers) else None
    else:
      flat[entry.path] = read(entry, None, shape)
  extra = [
    name
    for name in sorted(set(state) - used)
    if not any(re.fullmatch(pattern, name) for pattern in skip)
  ]
  _refuse(missing, extra, wrong)
  return nest(flat)


def disassemble(entries: Iterable[Entry], params: PyTree) -> dict[str, Any]:
  """Tensors under torch names: the inverse of `assemble`.

  Joined sources are cut into equal parts along the first torch axis.

  Raises:
    ValueError: the table does not name each parameter once.
  """
  entries, leaves = list(entries), flatten(params)
  _check_table(entries, leaves)
  state: dict[str, Any] = {}
  for entry in entries:
    value = np.asarray(leaves[entry.path])
    layers = list(enumerate(value)) if entry.stacked else [(None, value)]
    for i, layer in layers:
      parts = np.split(_to_torch(entry, layer), len(entry.sources))
      state.update(zip(entry.names(i), parts, strict=True))
  return state
