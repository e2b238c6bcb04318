"""Where the pictures that a record names are kept: a folder, tar or zip files.

In: the name in the record. Out: what `transforms.decode` takes, a path or the
bytes. No name leads outside the data folder and nothing is fetched from the
network; links inside the folder are the user's own and are followed. Members
of archives are read in place, never unpacked.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from scar_jax.data.archives import content_of, is_archive, members
from scar_jax.data.index import Table


class Missing(ValueError):
  """A name in a record that leads to no picture; the text is the reason."""


class Store(Protocol):
  """Pictures by name; picklable, and safe to share by threads."""

  def find(self, value: str) -> Any:
    """Where the picture lies.

    Raises:
      Missing: no such picture, or a name that is not accepted.
    """
    ...

  def read(self, place: Any) -> pathlib.Path | bytes:
    """What `find` found, as `transforms.decode` takes it."""
    ...


def checked_name(value: Any, root: pathlib.Path | None = None) -> str:
  """A name inside the data folder, with its dots resolved.

  Args:
    value: what the record says.
    root: the data folder, with which a name may begin.

  Raises:
    Missing: not a name, an address, or outside the folder.
  """
  if not isinstance(value, str) or not value.strip():
    raise Missing(
      f'not the path of a picture but {type(value).__name__} {value!r:.60}'
    )
  if '://' in value:
    raise Missing(f'an address, {value!r:.120}; download it first')
  name = os.path.normpath(value)
  if root is not None and os.path.isabs(name):
    name = os.path.relpath(name, root)
  if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
    raise Missing(f'{value!r} lies outside the data folder')
  return name


class Files:
  """Pictures in a folder.

  Args:
    root: what names are relative to.
  """

  def __init__(self, root: str | os.PathLike):
    self.root = pathlib.Path(root).absolute()

  def find(self, value: str) -> pathlib.Path:
    path = self.root / checked_name(value, self.root)
    try:
      if path.is_file():
        return path
    except ValueError:  # a NUL in the name
      pass
    hint = ' (use / between folders)' if '\\' in value else ''
    raise Missing(f'missing file {value!r}{hint}')

  def read(self, place: pathlib.Path) -> pathlib.Path:
    return place


class Archives:
  """Pictures in tar and zip files, found by the name of the member.

  Of an archive that is broken, what comes before the break is found.

  Args:
    paths: the archives.
  """

  def __init__(self, paths: Sequence[str | os.PathLike]):
    self.paths = [pathlib.Path(p) for p in paths]

    def blocks(notes: dict[str, int]) -> Iterator[np.ndarray]:
      rows = []
      for number, path in enumerate(self.paths):
        try:
          for m in members(path):
            name = _hash(os.path.normpath(m.name))
            rows.append((name, number, m.start, m.size, m.deflated))
        except ValueError as error:
          logging.warning('%s', error)
          notes['broken'] = notes.get('broken', 0) + 1
      table = np.array(rows, np.uint64).reshape(-1, 5)
      yield table[np.argsort(table[:, 0], kind='stable')]

    self._table = Table('members', self.paths, 5, blocks)

  def __len__(self) -> int:
    return len(self._table)

  def find(self, value: str) -> tuple[int, ...]:
    name = checked_name(value)
    wanted = _hash(name)
    at = self._table.find(wanted)
    if at < len(self._table):
      row = self._table[at].tolist()
      if row[0] == wanted:
        return tuple(row[1:])
    listed = ', '.join(p.name for p in self.paths[:3])
    more = ', ...' if len(self.paths) > 3 else ''
    broken = self._table.notes.get('broken', 0)
    damage = f'; {broken} of them broken' if broken else ''
    raise Missing(f'missing member {value!r} of {listed}{more}{damage}')

  def read(self, place: tuple[int, ...]) -> bytes:
    archive, start, size, deflated = place
    return content_of(self.paths[archive], start, size, bool(deflated))


class Both:
  """Pictures in a folder, or else in the archives that lie in it."""

  def __init__(self, files: Files, archives: Archives):
    self.files = files
    self.archives = archives

  def find(self, value: str) -> pathlib.Path | tuple[int, ...]:
    try:
      return self.files.find(value)
    except Missing:
      return self.archives.find(value)

  def read(self, place: pathlib.Path | tuple[int, ...]) -> pathlib.Path | bytes:
    inside = isinstance(place, tuple)
    return self.archives.read(place) if inside else self.files.read(place)


def open_store(path: str | os.PathLike) -> Store:
  """The pictures in a folder, in its archives, or in one archive.

  Raises:
    ValueError: no such folder or file.
  """
  path = pathlib.Path(path)
  if path.is_file() and is_archive(path):
    return Archives([path])
  if not path.is_dir():
    raise ValueError(
      f'pictures at {str(path)!r}: no such folder; accepted: a folder, a .tar'
      ' or a .zip (set --config.data.images)'
    )
  found = sorted(p for p in path.iterdir() if is_archive(p))
  return Both(Files(path), Archives(found)) if found else Files(path)


def _hash(name: str) -> int:
  """64 bits: that any two of ten million names agree has odds of 3 in 10^6."""
  digest = hashlib.blake2b(name.encode(errors='surrogatepass'), digest_size=8)
  return int.from_bytes(digest.digest())
