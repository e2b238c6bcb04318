"""Name tables between torch state dicts and flax parameters, both ways.

In: tensors under torch names as numpy arrays, a table of `Entry`, the abstract
parameters. Out: the parameters (`assemble`) or the tensors (`disassemble`):
each leaf filled once, each tensor used once, errors that list everything that
does not fit. Sources that hold `{i}` are one tensor for each stacked layer.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from scar_jax.convert.report import Report, current
from scar_jax.sharding import path_name, unbox
from scar_jax.streaming import Lazy
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
    cut: (part, parts): ours is one of so many equal parts of the tensor, along
      its first axis. The table has a row for every part.
  """

  path: str
  sources: tuple[str, ...]
  rule: str = 'same'
  in_dims: int = 1
  lead: int = 0
  tail: int = 0
  cut: tuple[int, int] = (0, 1)

  def __post_init__(self):
    if self.rule not in RULES:
      raise ValueError(
        f'{self.path}: rule {self.rule!r}; accepted: {", ".join(RULES)}'
      )

  def take(self, value: np.ndarray) -> np.ndarray:
    """Our part of a tensor; all of it where it does not divide."""
    part, parts = self.cut
    if parts == 1 or not value.ndim or value.shape[0] % parts:
      return value
    return np.split(value, parts)[part]

  @property
  def stacked(self) -> bool:
    """One tensor per layer, stacked along the first axis of ours."""
    return '{i}' in self.sources[0]

  def names(self, i: int | None = None) -> list[str]:
    """Torch names, of layer i if stacked."""
    return [s.replace('{i}', str(i)) for s in self.sources]


def encoder_artifact(
  cfg: Any, params: PyTree
) -> tuple[str, Any, dict[str, PyTree]]:
  """What `--config.encoder.artifact` takes, of an `EncoderConfig`."""
  return 'encoder', cfg, {'network': params}


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
  """The value in our shape, or None if it cannot be that parameter.

  A tensor that lies the other way round is never turned or reshaped to fit.
  """
  if entry.rule == 'conv':
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
  elif entry.rule == 'linear':
    rows = int(np.prod(shape[: entry.in_dims]))
    columns = int(np.prod(shape[entry.in_dims :]))
    if value.shape != (columns, rows):
      return None
    value = value.T.reshape(shape)
  elif entry.rule == 'flat':
    if value.shape != (int(np.prod(shape)),):
      return None
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


def torch_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Torch shape of each source of a parameter (of one layer) of our shape."""
  empty = np.broadcast_to(np.float32(0), shape)
  first, *rest = _to_torch(entry, empty).shape or (1,)
  if not shape:
    return ()
  return (first * entry.cut[1] // len(entry.sources), *rest)


def _draw(path: str, label: str, shape: tuple[int, ...]) -> np.ndarray:
  """A stand-in for a missing tensor: scales 1, biases 0, the rest normal."""
  last = path.rsplit('/', maxsplit=1)[-1]
  if last in ('scale', 'bias'):
    return np.full(shape, last == 'scale', np.float32)
  rng = np.random.default_rng(zlib.crc32(label.encode()))
  return 0.02 * rng.standard_normal(shape, np.float32)


class _Reader:
  """Reads parameters tensor by tensor and notes what does not fit."""

  def __init__(self, state: Mapping[str, np.ndarray], report: Report):
    self.state, self.report = state, report

  def make(self, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter of that shape; there is no other copy of it."""
    out = np.empty(shape, np.float32)
    if not entry.stacked:
      self.fill(entry, None, out)
      return out
    for i in range(shape[0]):
      # With the ellipsis it is a view also where a layer has no axes.
      self.fill(entry, i, out[i, ...])
    return out

  def fill(self, entry: Entry, i: int | None, out: np.ndarray) -> None:
    """Writes the parameter (of layer i) into `out`."""
    report, names = self.report, entry.names(i)
    wanted = torch_shape(entry, out.shape)
    absent = [n for n in names if n not in self.state]
    if absent:
      report.missing |= dict.fromkeys(absent, wanted)
      label = entry.path if i is None else f'{entry.path} layer {i}'
      report.drawn.append(label)
      if report.allow_missing:
        out[...] = _draw(entry.path, label, out.shape)
      return
    parts = [np.asarray(self.state[n], np.float32) for n in names]
    for name, part in zip(names, parts, strict=True):
      if not np.isfinite(part).all() and name not in report.not_finite:
        report.not_finite.append(name)
    # Parts that do not fit each other cannot be joined: report their shapes.
    fit = len({p.shape[1:] for p in parts}) == 1 and all(p.ndim for p in parts)
    value = parts[0]
    if len(parts) > 1:
      value = np.concatenate(parts) if fit else None
    fitted = None
    if value is not None:
      fitted = _to_ours(entry, entry.take(value), out.shape)
    if fitted is None:
      given = ' + '.join(str(p.shape) for p in parts)
      report.wrong.append(
        f'{" + ".join(names)} {given} for {entry.path} {out.shape}, wanted '
        f'{wanted}'
      )
      return
    report.used |= dict.fromkeys(names)
    out[...] = fitted


def assemble(
  entries: Iterable[Entry],
  state: Mapping[str, np.ndarray],
  abstract: PyTree,
  skip: Sequence[str] = (),
) -> dict[str, Any]:
  """Parameters like `abstract`, in float32.

  Tensors are asked for one at a time, so that a `state` that reads them from a
  file needs no memory of its own. Findings go to `report.current()`, which also
  says whether the parameters are arrays or `Lazy`.

  Args:
    entries: the table; names every leaf of `abstract`.
    state: torch tensors.
    abstract: shapes of the parameters, boxed or not.
    skip: regular expressions of tensor names that are left out on purpose.

  Raises:
    ValueError: lists missing, unexpected, wrongly shaped and not finite
      tensors, unless the report allows them.
  """
  entries, leaves = list(entries), flatten(abstract)
  _check_table(entries, leaves)
  report = current()
  reader = _Reader(state, report)
  again = _Reader(state, Report(allow_missing=report.allow_missing))
  flat: dict[str, Any] = {}
  named: set[str] = set()
  for entry in entries:
    shape = tuple(leaves[entry.path].shape)
    layers = range(shape[0]) if entry.stacked else (None,)
    named.update(name for i in layers for name in entry.names(i))
    array = reader.make(entry, shape)
    if report.lazy:
      make = functools.partial(again.make, entry, shape)
      flat[entry.path] = Lazy(shape, make)
    else:
      flat[entry.path] = array
    del array
  shapes = getattr(state, 'shapes', state)
  for name in sorted(set(state) - named):
    kind = report.unexpected
    if any(re.fullmatch(pattern, name) for pattern in skip):
      kind = report.skipped
    kind[name] = tuple(np.shape(shapes[name]))
  report.refuse()
  return nest(flat)


def disassemble(entries: Iterable[Entry], params: PyTree) -> dict[str, Any]:
  """Tensors under torch names: the inverse of `assemble`.

  Joined sources are cut into equal parts along the first torch axis, parts of
  one source are joined along it.

  Raises:
    ValueError: the table does not name each parameter once.
  """
  entries, leaves = list(entries), flatten(params)
  _check_table(entries, leaves)
  state: dict[str, Any] = {}
  cuts: dict[str, dict[int, np.ndarray]] = {}
  for entry in entries:
    value = np.asarray(leaves[entry.path])
    layers = list(enumerate(value)) if entry.stacked else [(None, value)]
    for i, layer in layers:
      tensor = _to_torch(entry, layer)
      if entry.cut[1] > 1:
        (name,) = entry.names(i)
        cuts.setdefault(name, {})[entry.cut[0]] = tensor
        continue
      # A tensor without axes, as CLIP's logit scale, cannot be split.
      count = len(entry.sources)
      parts = np.split(tensor, count) if count > 1 else [tensor]
      state.update(zip(entry.names(i), parts, strict=True))
  for name, parts in cuts.items():
    state[name] = np.concatenate([parts[n] for n in sorted(parts)])
  return state
