"""Where each record of a large data set lies: rows of numbers in a file.

In: rows of unsigned 64-bit numbers, made once by a pass over the data. Out:
any row by one read of a few bytes: memory does not grow with the data set, and
all worker processes share one copy. A small table stays in memory. Called by
the sources that find records inside larger files.

Files lie in the user's cache (`XDG_CACHE_HOME`, else ~/.cache, else the
temporary folder), never beside the data. Their names hold path, size and time
of what they describe, so that data which changed is indexed anew.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt64

Block: TypeAlias = Sequence[int] | np.ndarray  # whole rows, one after another

_IN_MEMORY = 1 << 20  # bytes; above, the rows go to a file
_HEADER = 256  # bytes before the first row
_VERSION = 1


def cache_folder() -> pathlib.Path:
  """A folder for index files, created if absent."""
  given = os.environ.get('XDG_CACHE_HOME')
  for base in (given, pathlib.Path.home() / '.cache', tempfile.gettempdir()):
    if base:
      folder = pathlib.Path(base) / 'scar_jax' / 'index'
      with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
          return folder
  raise OSError('no folder for index files can be written; set XDG_CACHE_HOME')


class Table:
  """Random access to rows of `width` numbers; picklable.

  Args:
    name: what is indexed, and how; part of the name of the file.
    files: that the rows describe.
    width: numbers in a row.
    blocks: makes the rows, in blocks of whole rows, and may fill the notes
      given to it. Called only when no index file is there yet.

  Attributes:
    notes: numbers about the whole, such as lines without content.
  """

  def __init__(
    self,
    name: str,
    files: Sequence[str | os.PathLike],
    width: int,
    blocks: Callable[[dict[str, int]], Iterable[Block]],
  ):
    self.width = width
    self.notes: dict[str, int] = {}
    self._rows: np.ndarray | None = None
    self._path: pathlib.Path | None = None
    mark = _mark(name, width, files)
    found = _cached(mark)
    if found:
      self._path = found
    else:
      self._build(mark, blocks(self.notes))
    self._open()

  def _build(self, mark: str, blocks: Iterable[Block]) -> None:
    held: list[np.ndarray] = []
    size = 0
    rest: Iterator[Block] = iter(blocks)
    for block in rest:
      held.append(np.asarray(block, np.uint64).reshape(-1, self.width))
      size += held[-1].nbytes
      if size > _IN_MEMORY:
        self._path = cache_folder() / mark
        self._write(held, rest)
        return
    empty = np.zeros((0, self.width), np.uint64)
    self._rows = np.concatenate([empty, *held])

  def _write(self, held: list[np.ndarray], rest: Iterable[Block]) -> None:
    assert self._path is not None
    handle, temporary = tempfile.mkstemp(dir=self._path.parent)
    try:
      with os.fdopen(handle, 'wb') as file:
        file.write(b' ' * _HEADER)
        while held:
          file.write(held.pop(0).tobytes())
        for block in rest:
          file.write(np.asarray(block, np.uint64).tobytes())
        header = json.dumps({'version': _VERSION, 'notes': self.notes})
        file.seek(0)
        file.write(header.encode())
      os.replace(temporary, self._path)
    except BaseException:
      pathlib.Path(temporary).unlink(missing_ok=True)
      raise

  def _open(self) -> None:
    if self._path is None:
      assert self._rows is not None
      self._count = len(self._rows)
      return
    self._file = os.open(self._path, os.O_RDONLY)
    header = json.loads(os.pread(self._file, _HEADER, 0))
    self.notes = header['notes']
    size = os.fstat(self._file).st_size - _HEADER
    self._count = size // (8 * self.width)

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, i: int) -> UInt64[np.ndarray, ' width']:
    """Row `i`, 0 <= i < len(self)."""
    if not 0 <= i < self._count:
      raise IndexError(f'row {i} of {self._count}')
    if self._rows is not None:
      return self._rows[i]
    length = 8 * self.width
    # One call with its own offset: threads share the descriptor. Read, not
    # mapped: pages of a map that was touched count as memory of the process.
    content = os.pread(self._file, length, _HEADER + i * length)
    return np.frombuffer(content, np.uint64)

  def find(self, value: int) -> int:
    """First row whose first number is >= `value`; the rows must be sorted."""
    low, high = 0, self._count
    while low < high:
      middle = (low + high) // 2
      if int(self[middle][0]) < value:
        low = middle + 1
      else:
        high = middle
    return low

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_file'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def __del__(self):
    if hasattr(self, '_file'):
      os.close(self._file)


def _mark(name: str, width: int, files: Sequence[str | os.PathLike]) -> str:
  """Name of the index file of these files as they are now."""
  digest = hashlib.sha256(f'{_VERSION} {name} {width}'.encode())
  for file in files:
    stat = os.stat(file)
    path = os.path.abspath(file)
    digest.update(f'\n{path} {stat.st_size} {stat.st_mtime_ns}'.encode())
  return digest.hexdigest()[:32]


def _cached(mark: str) -> pathlib.Path | None:
  with contextlib.suppress(OSError):
    path = cache_folder() / mark
    if path.is_file():
      return path
  return None
