"""Name tables of networks whose layers are stacked into one array.

In: a torch state dict as numpy arrays, a table of `Entry`, the abstract
parameters to fill. Out: the parameters, each leaf filled once, each tensor used
once. Sources that hold `{i}` are read for every layer and stacked.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from scar_jax.sharding import path_name, unbox
from scar_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one parameter comes from.

  Attributes:
    path: of our parameter, `a/b/c`.
    sources: torch names; several are joined along their first axis.
    rule: 'linear' ([out, in] to [in, out], then split into head axes), 'conv'
      (OIHW to HWIO) or 'same' (up to leading axes of size 1).
  """

  path: str
  sources: tuple[str, ...]
  rule: str = 'same'


def affine(path: str, source: str) -> list[Entry]:
  """Scale and bias of a norm."""
  return [
    Entry(f'{path}/scale', (f'{source}.weight',)),
    Entry(f'{path}/bias', (f'{source}.bias',)),
  ]


def linear(path: str, *sources: str, bias: bool = True) -> list[Entry]:
  """Kernel and bias of a linear map."""
  kernel = tuple(f'{s}.weight' for s in sources)
  entries = [Entry(f'{path}/kernel', kernel, 'linear')]
  if bias:
    biases = tuple(f'{s}.bias' for s in sources)
    entries.append(Entry(f'{path}/bias', biases))
  return entries


def _fit(value: np.ndarray, rule: str, shape: Sequence[int]):
  """The value in our shape, or None if it cannot be that parameter."""
  shape = tuple(shape)
  if rule == 'conv':
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    return value if value.shape == shape else None
  if rule == 'linear':
    splits = [
      (np.prod(shape[:n], dtype=int), np.prod(shape[n:], dtype=int))
      for n in range(1, len(shape))
    ]
    fits = value.ndim == 2 and value.shape[::-1] in splits
    return value.T.reshape(shape) if fits else None
  if value.shape == shape:
    return value
  # [1, 1, D] to [D], and the joined biases [3 D] to [3, H, K].
  flat = value.ndim == 1 or value.shape[value.ndim - len(shape) :] == shape
  fits = flat and value.size == np.prod(shape, dtype=int)
  return value.reshape(shape) if fits else None


def assemble(
  entries: Iterable[Entry],
  state: Mapping[str, np.ndarray],
  abstract: PyTree,
  skip: Sequence[str] = (),
) -> dict[str, Any]:
  """Parameters like `abstract`, in float32.

  Args:
    entries: the table; must name every leaf of `abstract`.
    state: torch tensors.
    abstract: shapes of the parameters, boxed or not.
    skip: regular expressions of tensor names that are left out on purpose.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  flat = jax.tree_util.tree_flatten_with_path(unbox(abstract))[0]
  shapes = {path_name(path): leaf.shape for path, leaf in flat}
  missing, wrong, used = [], [], set()
  params: dict[str, Any] = {}
  left = set(shapes)

  def read(entry: Entry, i: int | None, shape: Sequence[int]):
    names = [
      s if i is None else s.replace('{i}', str(i)) for s in entry.sources
    ]
    absent = [n for n in names if n not in state]
    missing.extend(absent)
    if absent:
      return None
    used.update(names)
    parts = [np.asarray(state[n]) for n in names]
    value = parts[0] if len(parts) == 1 else np.concatenate(parts)
    fitted = _fit(value, entry.rule, shape)
    if fitted is None:
      wrong.append(f'{"+".join(names)} {value.shape} for {entry.path} {shape}')
    return fitted

  for entry in entries:
    left.remove(entry.path)
    shape = shapes[entry.path]
    if '{i}' in entry.sources[0]:
      layers = [read(entry, i, shape[1:]) for i in range(shape[0])]
      bad = any(x is None for x in layers)
      value = None if bad else np.stack(layers).astype(np.float32)
    else:
      value = read(entry, None, shape)
      value = None if value is None else value.astype(np.float32)
    node = params
    *parents, last = entry.path.split('/')
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  assert not left, f'table without {sorted(left)}'
  extra = [
    name
    for name in sorted(set(state) - used)
    if not any(re.fullmatch(pattern, name) for pattern in skip)
  ]
  if missing or wrong or extra:
    raise ValueError(
      f'{len(missing)} tensors missing: {missing}; {len(extra)} unexpected: '
      f'{extra}; {len(wrong)} of wrong shape: {wrong}'
    )
  return params
