"""Checkpoints of public models as one flat, lazy dict of tensors.

In: a path that `files.open_file` takes. Out: `Checkpoint`: the reference's own
tensor names, without the containers and prefixes that training scripts put
around them, each tensor read and widened to float32 when asked for. Called by
`commands/convert.py`.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from scar_jax.convert.files import Stored, open_file

WEIGHTS = ('auto', 'ema', 'model')
# Removed only if every tensor carries it; the outermost first.
PREFIXES = (
  'trainer.var_wo_ddp.',
  'state_dict.',
  'module.',
  '_orig_mod.',
  'model.',
  'gpt_model.',
)
_EMA = ('ema.', 'model_ema.', 'ema_model.', 'ema_state_dict.')
# On some tensors only, these are a half-renamed file, or a container.
_NEVER_A_NAME = ('module.', '_orig_mod.')
_CONTAINERS = ('trainer.var_wo_ddp.', 'state_dict.')
# Outermost names of what training keeps beside the weights.
_EXTRA = re.compile(
  r'(opt|optim\w*|\w*_optim\w*|\w*scheduler|scaler|discriminator|steps?|epoch'
  r'|args)(\..*)?'
)


class Checkpoint(Mapping[str, np.ndarray]):
  """Tensors by reference name; a value is read at every access.

  Attributes:
    path: of the file.
    shapes: name -> shape and type, nothing read. `detect` functions take it.
    extras: tensors that are no weights: optimizer state, discriminators.
    notes: which containers and prefixes were removed, what was not chosen.
  """

  def __init__(
    self,
    path: str,
    tensors: Mapping[str, Stored],
    extras: Mapping[str, Stored] | None = None,
    notes: tuple[str, ...] = (),
  ):
    self.path, self.notes = path, notes
    self._tensors = dict(tensors)
    self.shapes = {k: _abstract(v) for k, v in self._tensors.items()}
    self.extras = {k: _abstract(v) for k, v in (extras or {}).items()}

  def __getitem__(self, name: str) -> np.ndarray:
    array = self._tensors[name].read()
    # bfloat16 is not a numpy floating type.
    if np.issubdtype(array.dtype, np.floating) or array.dtype.kind == 'V':
      return array.astype(np.float32, copy=False)
    return array

  def __contains__(self, name: object) -> bool:
    return name in self._tensors  # without reading it

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)


class Renamed(Mapping[str, np.ndarray]):
  """Tensors under other names, read no earlier than those they come from."""

  def __init__(
    self, state: Mapping[str, Any], rename: Callable[[str], str | None]
  ):
    """Renames; None leaves a tensor out.

    Raises:
      ValueError: two tensors would get one name.
    """
    self._state = state
    self._sources: dict[str, str] = {}
    twins = []
    for name in state:
      short = rename(name)
      if short in self._sources:
        twins.append(f'{self._sources[short]} and {name} -> {short}')
      elif short is not None:
        self._sources[short] = name
    if twins:
      raise ValueError(
        f'two tensors of one name: {twins}; accepted: one of each'
      )

  @property
  def shapes(self) -> dict[str, Any]:
    """Name -> what has the tensor's shape."""
    known = getattr(self._state, 'shapes', self._state)
    return {short: known[name] for short, name in self._sources.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    return self._state[self._sources[name]]

  def __contains__(self, name: object) -> bool:
    return name in self._sources

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)


def _abstract(stored: Stored) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(stored.shape, stored.dtype or np.float32)


def open_checkpoint(
  path: str | os.PathLike[str], weights: str = 'auto'
) -> Checkpoint:
  """A checkpoint under the names of the reference model.

  Args:
    path: see `files.open_file`.
    weights: where a file has both, 'ema' or 'model'; 'auto' is the moving
      average, as LlamaGen's own loader takes it.

  Raises:
    ValueError: see `files.open_file`; weights that are not there; a prefix on
      some tensors only; two tensors of one name; no tensors at all.
  """
  if weights not in WEIGHTS:
    raise ValueError(f'--weights={weights!r}; accepted: {", ".join(WEIGHTS)}')
  contents = open_file(path)
  extras = {k for k in contents.tensors if _EXTRA.fullmatch(k)}
  names = {k: k for k in contents.tensors if k not in extras}
  notes: list[str] = []
  if not names:
    raise ValueError(
      f'{path} holds no weights: {len(extras)} tensors, '
      f'{_some(sorted(extras))}; accepted: the state dict of a model'
    )
  names = _choose(str(path), names, weights, notes)
  names = _strip(str(path), names, contents.containers, extras, notes)
  pick = contents.tensors
  return Checkpoint(
    str(path),
    {short: pick[name] for name, short in names.items()},
    {name: pick[name] for name in sorted(extras)},
    tuple(notes),
  )


def _choose(
  path: str, names: dict[str, str], weights: str, notes: list[str]
) -> dict[str, str]:
  """Moving average or plain weights; original name -> name so far."""
  average = {
    k: k.removeprefix(start)
    for start in _EMA
    for k in names
    if k.startswith(start)
  }
  plain = {k: v for k, v in names.items() if k not in average}
  there = [n for n, v in (('ema', average), ('model', plain)) if v]
  chosen = there[0] if weights == 'auto' else weights
  if chosen not in there:
    raise ValueError(
      f'{path} has no weights of --weights={weights}; accepted here: '
      f'{", ".join(there)}, auto'
    )
  if len(there) == 2:
    left = {'ema': 'model', 'model': 'ema'}[chosen]
    notes.append(f'took the weights {chosen!r}, left {left!r} (--weights)')
  elif average:
    notes.append("removed the container 'ema'")
  return average if chosen == 'ema' else plain


def _strip(
  path: str,
  names: dict[str, str],
  containers: frozenset[str],
  extras: set[str],
  notes: list[str],
) -> dict[str, str]:
  """Removes prefixes until none is left; moves what lies beside a container.

  A container is a dict around all weights. Beside it lies what is no weight.
  """
  again = True
  while again:
    again = False
    for prefix in PREFIXES:
      inside = [k for k, v in names.items() if v.startswith(prefix)]
      if not inside:
        continue
      outside = [k for k in names if k not in set(inside)]
      holds = prefix in _CONTAINERS or prefix[:-1] in containers
      if outside and holds:
        extras.update(outside)
      elif outside and prefix in _NEVER_A_NAME:
        raise _mixed(path, names, inside, outside, prefix)
      elif outside:
        continue
      names = {k: names[k].removeprefix(prefix) for k in inside}
      notes.append(f'removed the prefix {prefix!r} of {len(inside)} tensors')
      containers, again = frozenset(), True
      break
  return names


def _mixed(
  path: str,
  names: Mapping[str, str],
  inside: list[str],
  outside: list[str],
  prefix: str,
) -> ValueError:
  bare = {names[k].removeprefix(prefix) for k in inside}
  twins = sorted(bare & {names[k] for k in outside})
  both = f', and without it {_some(twins)} would occur twice' if twins else ''
  return ValueError(
    f'{path}: {len(inside)} tensors have the prefix {prefix!r} '
    f'({_some(inside)}) and {len(outside)} have not ({_some(outside)}){both}; '
    'accepted: all or none'
  )


def _some(names: list[str]) -> str:
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more
