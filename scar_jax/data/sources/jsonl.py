"""Lines of a JSONL file by number, and one line as an object.

In: a UTF-8 file of any size, with or without byte-order mark, Unix or Windows
line ends. Out: raw lines in any order (`Lines`), and the object of one line
with what was odd about it (`parse`), or a `RecordError` that says what is
wrong with that line alone.
"""

import array
import json
import math
import os
import pathlib
from typing import Any

from scar_jax.data.records import RecordError

_BOM = b'\xef\xbb\xbf'
_OTHER_BOMS = {b'\xff\xfe': 'UTF-16', b'\xfe\xff': 'UTF-16'}


class Lines:
  """Random access to the lines that have content.

  Attributes:
    blank: number of blank lines, which are not counted as lines here.

  Raises:
    ValueError: the file is UTF-16.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.blank = 0
    starts, numbers = array.array('Q'), array.array('Q')
    offset = 0
    with open(self.path, 'rb') as file:
      name = _OTHER_BOMS.get(file.read(2))
      if name:
        raise ValueError(f'{self.path} is {name}; save it as UTF-8')
      file.seek(0)
      for number, line in enumerate(file, 1):
        if number == 1 and line.startswith(_BOM):
          # Skipped here, so a mark before a blank line is no content.
          offset, line = len(_BOM), line[len(_BOM) :]
        if line.isspace() or not line:
          self.blank += 1
        else:
          starts.append(offset)
          numbers.append(number)
        offset += len(line)
    self._end = offset
    self._starts, self._numbers = starts, numbers
    self._file = os.open(self.path, os.O_RDONLY)

  def __len__(self) -> int:
    return len(self._starts)

  def number(self, i: int) -> int:
    """Physical line number, from 1, of line `i`."""
    return self._numbers[i]

  def read(self, i: int) -> bytes:
    """Line `i` without its end."""
    start = self._starts[i]
    end = self._starts[i + 1] if i + 1 < len(self) else self._end
    # One system call with its own offset: threads share the descriptor.
    content = os.pread(self._file, end - start, start)
    return content.partition(b'\n')[0].rstrip(b'\r')

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_file'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._file = os.open(self.path, os.O_RDONLY)

  def __del__(self):
    if hasattr(self, '_file'):  # absent when the file could not be read
      os.close(self._file)


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
