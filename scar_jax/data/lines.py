"""Records of a JSON file by number, and one of them as an object.

In: a UTF-8 file of any size, with or without byte-order mark, Unix or Windows
line ends: JSON lines, or one JSON array. Out: the bytes of any record
(`Lines`), and its object with what was odd about it (`parse`), or a
`RecordError` that says what is wrong with that record alone. Where records lie
is kept in an index file (`index.py`), not in memory.
"""

import array
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scar_jax.data.index import Table
from scar_jax.data.records import RecordError

_BOM = b'\xef\xbb\xbf'
_OTHER_BOMS = {b'\xff\xfe': 'UTF-16', b'\xfe\xff': 'UTF-16'}
_BLOCK = 3 << 14  # numbers handed to the index at a time
_SPACE = ' \t\r\n'


class Lines:
  """Random access to the lines that have content, or to array elements.

  Args:
    path: the file.
    keep: of each record, from its bytes, whether it is one of this data set.
    name: what `keep` chooses, as part of the name of the index.

  Attributes:
    blank: number of blank lines, which are not counted as lines here.
    unit: 'line', or 'element' of an array: what `number` counts.

  Raises:
    ValueError: the file is UTF-16, or a broken JSON array.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    keep: Callable[[bytes], bool] | None = None,
    name: str = '',
  ):
    self.path = pathlib.Path(path)
    with open(self.path, 'rb') as file:
      start = file.read(256)
    other = _OTHER_BOMS.get(start[:2])
    if other:
      raise ValueError(f'{self.path} is {other}; save it as UTF-8')
    is_array = start.removeprefix(_BOM).lstrip()[:1] == b'['
    # A line may be an array too, which is then judged as a bad line.
    is_array = is_array and self.path.suffix == '.json'
    self.unit = 'element' if is_array else 'line'
    rows = _element_rows if is_array else _line_rows

    def blocks(notes: dict[str, int]) -> Iterator[Sequence[int]]:
      block = array.array('Q')
      for offset, length, number, content in rows(self.path, notes):
        if keep is None or keep(content):
          block.extend((offset, length, number))
          if len(block) >= _BLOCK:
            yield block
            block = array.array('Q')
      yield block

    self._table = Table(f'{self.unit}s {name}', [self.path], 3, blocks)
    self.blank = self._table.notes.get('blank', 0)
    self._file = os.open(self.path, os.O_RDONLY)

  def __len__(self) -> int:
    return len(self._table)

  def number(self, i: int) -> int:
    """Physical number, from 1, of line or element `i`."""
    return int(self._table[i][2])

  def read(self, i: int) -> bytes:
    """Line `i` without its end."""
    offset, length, _ = self._table[i].tolist()
    # One system call with its own offset: threads share the descriptor.
    return os.pread(self._file, length, offset)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_file'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._file = os.open(self.path, os.O_RDONLY)

  def __del__(self):
    if hasattr(self, '_file'):  # absent when the file could not be read
      os.close(self._file)


def _line_rows(
  path: pathlib.Path, notes: dict[str, int]
) -> Iterator[tuple[int, int, int, bytes]]:
  """(offset, length, number, content) of each line that has content."""
  offset = blank = 0
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if number == 1 and line.startswith(_BOM):
        # Skipped here, so a mark before a blank line is no content.
        offset, line = len(_BOM), line[len(_BOM) :]
      if line.isspace() or not line:
        blank += 1
      else:
        content = line.rstrip(b'\r\n')
        yield offset, len(content), number, content
      offset += len(line)
  notes['blank'] = blank


def _element_rows(
  path: pathlib.Path, notes: dict[str, int]
) -> Iterator[tuple[int, int, int, bytes]]:
  """The same of each element of one JSON array; reads the file at once."""
  content = path.read_bytes()
  # One character for each byte keeps offsets; only structure is read here.
  text = content.decode('latin-1')
  decoder = json.JSONDecoder()
  at, number = text.index('[') + 1, 0
  notes['blank'] = 0
  while True:
    while at < len(text) and text[at] in _SPACE + ',':
      at += 1
    if text[at : at + 1] == ']':
      return
    try:
      _, end = decoder.raw_decode(text, at)
    except ValueError as error:
      raise ValueError(
        f'{path}: broken JSON array after {number} elements: {error}'
      ) from None
    number += 1
    yield at, end - at, number, content[at:end]
    at = end


def parse(line: bytes, key: str) -> tuple[dict[str, Any], list[str]]:
  """The object of a line, and warnings.

  Of a key that appears twice the last value counts, with a warning. NaN and
  Infinity are read, so that a use of them can be judged where they lie.

  Raises:
    RecordError: not UTF-8, broken JSON, or not an object.
  """
  try:
    text = line.decode()
  except UnicodeDecodeError as error:
    raise RecordError(
      key,
      f'not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}'
      ' (latin-1 or another encoding?); save the file as UTF-8',
    ) from None
  warnings: list[str] = []

  def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
      names = [name for name, _ in pairs]
      twice = sorted({n for n in names if names.count(n) > 1})
      warnings.append(
        f'duplicate key {", ".join(twice)}: the last value counts'
      )
    return built

  try:
    value = json.loads(text, object_pairs_hook=build)
  except (ValueError, RecursionError) as error:
    raise RecordError(key, f'broken JSON: {error}') from None
  if not isinstance(value, dict):
    raise RecordError(
      key, f'not an object but {type(value).__name__}: {text[:60]}'
    )
  return value, warnings


def has_nan(value: Any) -> bool:
  """Whether a value holds NaN or an infinity, at any depth."""
  if isinstance(value, float):
    return not math.isfinite(value)
  if isinstance(value, dict):
    value = list(value.values())
  return isinstance(value, list) and any(map(has_nan, value))
