"""WebDataset tars: the files of a record lie together and share their name.

In: `data.path`, a .tar or a folder of them (those whose names begin with the
split, if any do). Out: a `Source`. The ending after the first dot of the name
says what a file is: see `data/fields.py`, with or without the ending of the
picture (`jpg`, `source.png`, `mask.png`, `txt`, `cls`); a `json` file gives
more fields. Random access by an index of records: one read each.

Of a shard that is broken, what comes before the break is used; the break is
one bad record, so that it is counted and reported.
"""

import io
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from scar_jax.data import pictures
from scar_jax.data.archives import TAR, members
from scar_jax.data.fields import Fields, checked_label
from scar_jax.data.index import Table
from scar_jax.data.records import Record, RecordError
from scar_jax.data.sources.imagefolder import ENDINGS
from scar_jax.data.text import checked_text

_PICTURES = ('target', 'condition', 'mask')
_PROBED = 16


def make(data_cfg: Any, split: str) -> 'WebDataset':
  """The source of a `data` section."""
  shards = find_shards(data_cfg.path, split, TAR, 'webdataset')
  return WebDataset(shards, Fields(data_cfg.kind, data_cfg.columns))


def find_shards(
  path: str, split: str, ending: str, source: str
) -> list[pathlib.Path]:
  """The shards of a split.

  They lie in `path`, `path/data` or `path/<split>`. If the names of some
  begin with the split, only these are taken; if none does, all are, unless
  their names begin with another split.

  Raises:
    ValueError: no shard; lists what is there.
  """
  root = pathlib.Path(path)
  if path and root.is_file():
    return [root]
  if not path or not root.is_dir():
    raise ValueError(
      f'data.path={path!r} does not exist; data.source={source} needs a'
      f' {ending} file or a folder of them (set --config.data.path)'
    )
  for folder in (root / split, root, root / 'data'):
    found = sorted(folder.glob(f'*{ending}')) if folder.is_dir() else []
    named = [p for p in found if p.name.startswith(split)]
    other = [p for p in found if p.name.startswith(('train', 'val', 'test'))]
    if folder.name == split and found:
      return found
    if named or (found and not other):
      return named or found
  listed = sorted(p.name for p in root.iterdir())[:10]
  raise ValueError(
    f'data.path={path!r} has no {ending} file of data.split={split!r}; found:'
    f' {", ".join(listed) or "nothing"}'
  )


class WebDataset:
  """Records of tar shards.

  Args:
    shards: tar files.
    fields: names of the fields, and which ones a record must have.

  Raises:
    ValueError: no record, or the first ones lack a field.
  """

  def __init__(self, shards: list[pathlib.Path], fields: Fields):
    self.shards = shards
    self.fields = fields
    # Of a record: shard, first byte, length; a broken end has length 0.
    self._table = Table('records', shards, 3, self._blocks)
    if not len(self._table):
      raise ValueError(f'{shards[0].parent}: no record in {len(shards)} shards')
    self._check_first()

  def _blocks(self, notes: dict[str, int]) -> Iterator[list[int]]:
    del notes
    for number, shard in enumerate(self.shards):
      block: list[int] = []
      stem, start, end = '', 0, 0
      try:
        for member in members(shard):
          here = _split(member.name)[0]
          if here != stem:
            if stem:
              block += (number, start, end - start)
            stem, start = here, member.header
          end = member.start + member.size
      except ValueError:
        # The last record may lack files that came behind the break.
        block += (number, 0, 0)
      else:
        if stem:
          block += (number, start, end - start)
      yield block

  def _check_first(self) -> None:
    for i in range(min(len(self), _PROBED)):
      try:
        files, key = self._files(i)
        found = self._values(files, key)
      except RecordError:
        continue
      matched = self.fields.match(found)
      if not matched:
        continue  # a stray file, such as a note
      where = f'{key}, files of the record'
      self.fields.check_schema(found, where)
      return

  def __len__(self) -> int:
    return len(self._table)

  def describe(self) -> str:
    return (
      f'webdataset {self.shards[0].parent}: {len(self)} records in'
      f' {len(self.shards)} shards, {self.fields.kind}'
    )

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Record `i` in the order of shards; nothing is random here."""
    del rng
    files, key = self._files(i)
    values = self._values(files, key)
    matched = self.fields.match(values)
    self.fields.check_record(matched, values, key)
    read: dict[str, Any] = {}
    for role, name in matched.items():
      value = values[name]
      if role in _PICTURES and not isinstance(value, bytes):
        raise RecordError(key, f'{name!r} is no picture but {value!r:.60}')
      if role == 'mask':
        read[role] = pictures.mask(value, name, key, read['target'])
      elif role in _PICTURES:
        deep = role == 'condition' and self.fields.kind == 'depth'
        read[role] = pictures.picture(value, name, key, deep)
      elif role == 'label':
        read[role] = checked_label(_number(value), name, key)
      else:
        read[role] = checked_text(_decoded(value, name, key), key)
    return Record(**read, key=key)

  def size(self, i: int) -> tuple[int, int]:
    """(height, width) of the target of record `i`, from its header."""
    files, key = self._files(i)
    values = self._values(files, key)
    name = self.fields.match(values).get('target', '')
    if not isinstance(values.get(name), bytes):
      raise RecordError(key, 'has no target picture')
    return pictures.size(values[name], name, key)

  def _files(self, i: int) -> tuple[dict[str, bytes], str]:
    """Ending -> content of the files of a record, and its key."""
    shard, start, length = self._table[i].tolist()
    path = self.shards[shard]
    if not length:
      try:
        for _ in members(path):
          pass
      except ValueError as error:
        raise RecordError(path.name, f'broken shard: {error}') from error
      raise RecordError(path.name, 'changed while it was read')
    with open(path, 'rb', buffering=0) as file:
      content = os.pread(file.fileno(), length, start)
    files, key = {}, path.name
    try:
      # The block of the last file is filled up, and two of zeros end a tar.
      whole = io.BytesIO(content.ljust((length // 512 + 3) * 512, b'\0'))
      with tarfile.open(fileobj=whole, mode='r:') as tar:
        for info in tar:
          stem, ending = _split(info.name)
          key = f'{path.name}/{stem}'
          member = tar.extractfile(info)
          if member is not None:
            files[ending] = member.read()
    except tarfile.TarError as error:
      raise RecordError(key, f'broken tar: {error}') from error
    return files, key

  def _values(self, files: dict[str, bytes], key: str) -> dict[str, Any]:
    """Field -> value: the files, and what the JSON file holds."""
    values: dict[str, Any] = {}
    for ending, content in files.items():
      field, dot, last = ending.rpartition('.')
      if f'.{last.lower()}' in ENDINGS:
        # `source.jpg` is the field `source`; `jpg` alone is the picture.
        values[field if dot else 'image'] = content
      elif ending != 'json':
        values[ending] = content
    if 'json' in files:
      try:
        more = json.loads(files['json'])
      except (ValueError, RecursionError) as error:
        raise RecordError(key, f'broken JSON: {error}') from error
      if isinstance(more, dict):
        values = more | values
    return values


def _split(name: str) -> tuple[str, str]:
  """'a/b.source.jpg' -> ('a/b', 'source.jpg'): the first dot of the name."""
  folder, file = os.path.split(name)
  stem, _, ending = file.partition('.')
  return os.path.join(folder, stem), ending


def _number(value: Any) -> Any:
  text = value.strip() if isinstance(value, bytes) else b''
  return int(text) if text.isdigit() else value


def _decoded(value: Any, name: str, key: str) -> Any:
  if not isinstance(value, bytes):
    return value
  try:
    return value.decode()
  except UnicodeDecodeError as error:
    raise RecordError(key, f'{name!r} is not UTF-8: {error}') from error
