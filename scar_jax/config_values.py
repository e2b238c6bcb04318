"""Single config values: from text, YAML or Python to the type of the field.

In: a value and the annotation of the dataclass field it is for. Out: the value
in that type, or a ValueError that names the field, the value and what is
accepted. Nothing is rounded, truncated or guessed.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

_TRUE = ('true', '1', 'yes', 'on', 't', 'y')
_FALSE = ('false', '0', 'no', 'off', 'f', 'n')
BOOLEAN_WORDS = frozenset((*_TRUE, *_FALSE))
_INT = re.compile(r'[+-]?(0|[1-9][0-9_]*)')
# Fields that many dataclasses share, with the same meaning everywhere.
_SHARED_CHOICES = {'dtype': ('float32', 'bfloat16')}


def number(default: Any, low: Any = None, high: Any = None) -> Any:
  """A dataclass field with an inclusive range."""
  return dataclasses.field(default=default, metadata={'low': low, 'high': high})


def choice(default: Any, *accepted: Any) -> Any:
  """A dataclass field with a fixed list of values."""
  return dataclasses.field(default=default, metadata={'accepted': accepted})


def nearest(name: str, known: Iterable[str]) -> str:
  """' Did you mean X?', or '' when nothing is close."""
  known = list(known)
  # A dash or a capital is no mistake worth a distance.
  folded = {k.lower().replace('-', '_'): k for k in known}
  close = difflib.get_close_matches(
    name.lower().replace('-', '_'), folded, n=1, cutoff=0.5
  )
  return f' Did you mean {folded[close[0]]!r}?' if close else ''


def nearest_multiples(value: int, factor: int) -> str:
  """'8 or 12' for 10 and 4; only '4' for 2 and 4."""
  low = value // factor * factor
  return f'{low} or {low + factor}' if low else str(factor)


def check_multiple(name: str, value: int, factor: int, why: str) -> None:
  """Refuses a size that its factor does not divide.

  Args:
    name: config field.
    value: its value.
    factor: what must divide it.
    why: what the factor is, in words.

  Raises:
    ValueError: names the nearest sizes.
  """
  if value % factor:
    raise ValueError(
      f'{name}={value} is not a multiple of {factor}, {why}; accepted: '
      f'{nearest_multiples(value, factor)} (set --config.{name})'
    )


def unknown_name(name: str, known: Iterable[str], path: str = '') -> ValueError:
  """The error for a field that does not exist."""
  known = sorted(known)
  return ValueError(
    f'config has no field {path + name!r}.{nearest(name, known)} '
    f'Known: {", ".join(known)}'
  )


def read_section(
  path: str,
  schema: type | Mapping[str, Any],
  values: Mapping[str, Any],
  defaults: Mapping[str, Any] | None = None,
) -> Any:
  """Builds one section.

  Args:
    path: name of the section, for messages.
    schema: a dataclass, or name -> type (then a dict is returned).
    values: what the user gave.
    defaults: of a plain schema.

  Raises:
    ValueError: an unknown field, a wrong type, a value out of range.
  """
  dot = f'{path}.' if path else ''
  if not isinstance(values, Mapping):
    raise ValueError(f'{path}={values!r} must be a section with fields')
  if isinstance(schema, Mapping):
    hints, infos = dict(schema), {}
  else:
    hints = typing.get_type_hints(schema)
    infos = {f.name: f for f in dataclasses.fields(schema)}
    hints = {name: hints[name] for name in infos}
  for name in values:
    if name not in hints:
      raise unknown_name(name, hints, dot)
  read = dict(defaults or {})
  for name, value in values.items():
    read[name] = read_value(dot + name, hints[name], value)
    metadata = infos[name].metadata if name in infos else {}
    _check_range(dot + name, name, read[name], metadata)
  if isinstance(schema, Mapping):
    return read
  try:
    return schema(**read)
  except TypeError as error:
    raise ValueError(f'section {path!r}: {error}') from error


def _check_range(
  path: str, name: str, value: Any, metadata: Mapping[str, Any]
) -> None:
  accepted = metadata.get('accepted') or _SHARED_CHOICES.get(name)
  if accepted and value not in accepted:
    listed = ', '.join(map(str, accepted))
    hint = nearest(str(value), map(str, accepted))
    raise ValueError(f'{path}={value!r}; accepted: {listed}.{hint}')
  low, high = metadata.get('low'), metadata.get('high')
  if low is not None and value < low:
    raise ValueError(f'{path}={value!r} is below the least accepted, {low}')
  if high is not None and value > high:
    raise ValueError(f'{path}={value!r} is above the most accepted, {high}')


def read_value(path: str, kind: Any, value: Any) -> Any:
  """One value in the type `kind`, from the same type or from text."""
  origin = typing.get_origin(kind)
  if kind is Any:
    return value
  if origin in (typing.Union, types.UnionType):
    return _read_union(path, typing.get_args(kind), value)
  if origin is tuple:
    return _read_tuple(path, typing.get_args(kind), value)
  if isinstance(kind, type) and dataclasses.is_dataclass(kind):
    same = isinstance(value, kind)
    return value if same else read_section(path, kind, value)
  reader = {bool: _bool, int: _int, float: _float, str: _str}.get(kind)
  if reader is None:
    raise ValueError(f'{path}: fields of type {kind} cannot be configured')
  return reader(path, value)


def _wrong(path: str, value: Any, wanted: str) -> ValueError:
  return ValueError(
    f'{path}={value!r} is not {wanted} (set --config.{path}=...)'
  )


def _bool(path: str, value: Any) -> bool:
  word = str(value).strip().lower()
  if isinstance(value, (bool, int, str)) and word in BOOLEAN_WORDS:
    return word in _TRUE
  raise _wrong(path, value, 'true or false')


def _int(path: str, value: Any) -> int:
  if isinstance(value, int) and not isinstance(value, bool):
    return value
  if isinstance(value, str) and _INT.fullmatch(value.strip()):
    return int(value)
  raise _wrong(path, value, 'a whole number')


def _float(path: str, value: Any) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float, str)):
    raise _wrong(path, value, 'a number')
  try:
    read = float(value)
  except ValueError:
    raise _wrong(path, value, 'a number') from None
  if not math.isfinite(read):
    raise _wrong(path, value, 'a finite number')
  return read


def _str(path: str, value: Any) -> str:
  if not isinstance(value, str):
    # YAML reads 0123 as 83 and no as False: the text is already lost.
    raise _wrong(path, value, 'text; put it in quotes')
  return value


def _read_union(path: str, kinds: tuple[Any, ...], value: Any) -> Any:
  if type(None) in kinds:
    if value is None or (isinstance(value, str) and value.lower() == 'none'):
      return None
    kinds = tuple(k for k in kinds if k is not type(None))
  error: Exception | None = None
  for kind in kinds:
    try:
      return read_value(path, kind, value)
    except ValueError as caught:
      error = error or caught
  raise error or _wrong(path, value, 'accepted')


def _read_tuple(path: str, kinds: tuple[Any, ...], value: Any) -> tuple:
  if isinstance(value, str):
    # '1,2' and '(1, 2)' on a command line.
    # 'name=1' is a pair inside a list of pairs.
    pair = len(kinds) == 2 and kinds[1] is not Ellipsis and '=' in value
    parts = value.strip().strip('()[]').split('=' if pair else ',')
    value = [part.strip().strip('\'"') for part in parts if part.strip()]
  if not isinstance(value, (tuple, list)):
    raise _wrong(path, value, 'a list such as 1,2')
  if len(kinds) == 2 and kinds[1] is Ellipsis:
    kinds = (kinds[0],) * len(value)
  if len(kinds) != len(value):
    raise _wrong(path, value, f'a list of {len(kinds)} values')
  return tuple(
    read_value(f'{path}[{i}]', kind, item)
    for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
  )
