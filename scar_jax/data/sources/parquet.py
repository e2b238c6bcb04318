"""Hugging Face parquet shards that hold pictures.

In: `data.path`, a .parquet file or a folder of them (`find_shards`), such as
InstructPix2Pix or MagicBrush. Out: a `Source`. A picture is a struct of `bytes`
and `path`, or plain binary, or a path; columns by the names of
`data/fields.py` or by `data.columns`.

Parquet is packed in row groups, which can only be read whole. With
`data.cache` each group is unpacked there once, as an Arrow file, and every
record then costs one read. Without it the last few groups are held in memory,
and shuffled reading unpacks a group for almost every record.

A shard that cannot be opened is one bad record, so that it is counted.
"""

import collections
import hashlib
import os
import pathlib
import threading
from typing import Any

import numpy as np
from absl import logging

from scar_jax.data import pictures
from scar_jax.data.fields import Fields, checked_label
from scar_jax.data.records import Record, RecordError
from scar_jax.data.sources.webdataset import find_shards
from scar_jax.data.stores import Files, Missing
from scar_jax.data.text import checked_text
from scar_jax.extras import require

_PICTURES = ('target', 'condition', 'mask')
_HELD = 4  # row groups in memory of one process, without a cache
_LARGE = 8 << 20  # bytes of a row group, above which a cache is advised


def make(data_cfg: Any, split: str) -> 'Parquet':
  """The source of a `data` section."""
  shards = find_shards(data_cfg.path, split, '.parquet', 'parquet')
  fields = Fields(data_cfg.kind, data_cfg.columns)
  return Parquet(shards, fields, data_cfg.cache)


class Parquet:
  """Records of parquet shards.

  Args:
    shards: the files.
    fields: names of the columns, and which ones must be there.
    cache: folder for unpacked row groups; '' keeps the last few in memory.

  Raises:
    ValueError: no rows, no shard that can be opened, a column that is missing
      or of another type.
  """

  def __init__(
    self, shards: list[pathlib.Path], fields: Fields, cache: str = ''
  ):
    self.shards = shards
    self.fields = fields
    self.cache = pathlib.Path(cache) if cache else None
    self.columns: dict[str, str] = {}
    self.broken: dict[int, str] = {}
    self._store = Files(shards[0].parent)
    # Of a row group: first record, shard, number in the shard.
    groups: list[tuple[int, int, int]] = []
    self._count, largest = 0, 0
    for number, shard in enumerate(shards):
      try:
        meta = _open(shard).metadata
      except Exception as error:
        # pyarrow raises its own errors, OSError and more.
        self.broken[number] = f'{type(error).__name__}: {error}'
        groups.append((self._count, number, -1))
        self._count += 1
        continue
      self._check(shard)
      for group in range(meta.num_row_groups):
        info = meta.row_group(group)
        if info.num_rows:
          groups.append((self._count, number, group))
          self._count += info.num_rows
          largest = max(largest, info.total_byte_size)
    where = shards[0] if len(shards) == 1 else shards[0].parent
    if len(self.broken) == len(shards):
      raise ValueError(
        f'{where}: no shard can be opened; {shards[0].name}: {self.broken[0]}'
      )
    if self._count == len(self.broken):
      raise ValueError(f'{where}: 0 rows in {len(shards)} shards')
    self._groups = np.array(groups, np.int64)
    if largest > _LARGE and not self.cache:
      logging.warning(
        '%s: row groups of up to %d MiB are unpacked for almost every record'
        ' that is read at random; set --config.data.cache=DIR to unpack each'
        ' once',
        where,
        largest >> 20,
      )
    self._reset()

  def _reset(self) -> None:
    self._lock = threading.Lock()
    self._held: collections.OrderedDict[int, Any] = collections.OrderedDict()

  def _check(self, shard: pathlib.Path) -> None:
    """Judges the columns of a shard; the first one settles their names."""
    schema = _open(shard).schema_arrow
    matched = self.fields.check_schema(schema.names, str(shard))
    self.columns = self.columns or matched
    if matched != self.columns:
      raise ValueError(
        f'{shard}: columns {matched}; the first shard has {self.columns}'
      )
    for role in _PICTURES:
      name = matched.get(role)
      if name and not _holds_pictures(schema.field(name).type):
        raise ValueError(
          f'{shard}: column {name!r} for {role} is {schema.field(name).type};'
          ' accepted: a struct of bytes and path, binary, or text with a path'
          f' (name another: --config.data.columns={role}=NAME)'
        )

  def __len__(self) -> int:
    return self._count

  def describe(self) -> str:
    columns = ', '.join(f'{r}={n}' for r, n in self.columns.items())
    return (
      f'parquet {self.shards[0].parent}: {len(self)} rows in'
      f' {len(self.shards)} shards, {self.fields.kind}, {columns}'
    )

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Row `i` in the order of shards; nothing is random here."""
    del rng
    row, key = self._row(i)
    read: dict[str, Any] = {}
    for role, name in self.columns.items():
      value = row[name]
      if role == 'text':
        read[role] = checked_text(value, key)
      elif role == 'label':
        read[role] = checked_label(value, name, key)
      elif role == 'mask':
        if value is not None:
          image = self._picture(value, name, key)
          read[role] = pictures.mask(image, name, key, read['target'])
      else:
        deep = role == 'condition' and self.fields.kind == 'depth'
        image = self._picture(value, name, key)
        read[role] = pictures.picture(image, name, key, deep)
    return Record(**read, key=key)

  def size(self, i: int) -> tuple[int, int]:
    """(height, width) of the target of row `i`, from its header."""
    row, key = self._row(i)
    name = self.columns['target']
    return pictures.size(self._picture(row[name], name, key), name, key)

  def _row(self, i: int) -> tuple[dict[str, Any], str]:
    """The wanted columns of row `i`, and its key."""
    at = int(np.searchsorted(self._groups[:, 0], i, side='right')) - 1
    first, shard, group = self._groups[at].tolist()
    path = self.shards[shard]
    if group < 0:
      raise RecordError(path.name, f'broken shard: {self.broken[shard]}')
    key = f'{path.name} row {i - int(self._first(shard))}'
    try:
      row = self._group(at).slice(i - first, 1).to_pylist()[0]
    except RecordError:
      raise
    except Exception as error:
      raise RecordError(key, f'row group {group} is broken: {error}') from error
    return row, key

  def _first(self, shard: int) -> int:
    """Number of the first record of a shard."""
    return self._groups[np.argmax(self._groups[:, 1] == shard), 0]

  def _picture(self, value: Any, name: str, key: str) -> Any:
    """Bytes or path of a cell."""
    if value is None:
      raise RecordError(key, f'column {name!r} is null')
    if isinstance(value, dict):
      content, value = value.get('bytes'), value.get('path')
      if content is not None:
        return content
      if not value:
        raise RecordError(key, f'column {name!r}: bytes are null, path too')
    if isinstance(value, bytes):
      return value
    try:
      return self._store.find(value)
    except Missing as error:
      raise RecordError(key, f'column {name!r}: {error}') from error

  def _group(self, at: int) -> Any:
    """The wanted columns of a row group, as an Arrow table."""
    with self._lock:
      if at in self._held:
        self._held.move_to_end(at)
        return self._held[at]
      table = self._unpacked(at) if self.cache else self._read(at)
      self._held[at] = table
      # Mapped files are only addresses; tables are memory.
      if not self.cache and len(self._held) > _HELD:
        self._held.popitem(last=False)
      return table

  def _read(self, at: int) -> Any:
    _, shard, group = self._groups[at].tolist()
    names = sorted(set(self.columns.values()))
    return _open(self.shards[shard]).read_row_group(group, columns=names)

  def _unpacked(self, at: int) -> Any:
    """The row group as a mapped Arrow file, written if it is not there."""
    arrow = require('pyarrow', 'parquet')
    assert self.cache is not None
    _, shard, group = self._groups[at].tolist()
    source = self.shards[shard]
    stat = source.stat()
    mark = hashlib.sha256(
      f'{source.absolute()} {stat.st_size} {stat.st_mtime_ns}'
      f' {sorted(self.columns.values())}'.encode()
    ).hexdigest()[:16]
    path = self.cache / f'{source.stem}-{mark}-{group}.arrow'
    if not path.is_file():
      self.cache.mkdir(parents=True, exist_ok=True)
      table = self._read(at)
      temporary = path.with_suffix(f'.{os.getpid()}-{threading.get_ident()}')
      try:
        with arrow.ipc.new_file(str(temporary), table.schema) as writer:
          writer.write_table(table)
        os.replace(temporary, path)
      finally:
        temporary.unlink(missing_ok=True)
    return arrow.ipc.open_file(arrow.memory_map(str(path))).read_all()

  def __getstate__(self) -> dict[str, Any]:
    own = ('_lock', '_held')
    return {k: v for k, v in self.__dict__.items() if k not in own}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._reset()


def _open(path: pathlib.Path) -> Any:
  require('pyarrow', 'parquet')
  import pyarrow.parquet

  return pyarrow.parquet.ParquetFile(path)


def _holds_pictures(kind: Any) -> bool:
  text = str(kind)
  if text.startswith('struct<'):
    names = {kind.field(i).name for i in range(kind.num_fields)}
    return 'bytes' in names
  return text in ('binary', 'large_binary', 'string', 'large_string')
