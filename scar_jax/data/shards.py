"""Rows of arrays in ArrayRecord files: how they are packed, written and read.

In: the columns of a row, names with dtype and shape. Out: bytes, and back; a
shard written whole or not at all, with its checksum; random access over many
shards. A row is a byte that says whether it is good, its arrays one after
another in the order of the columns; of a record that could not be used, its key
and the reason. Called by `precompute.py` and by the sources `cache` and `tfds`.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from scar_jax.data.records import RecordError
from scar_jax.extras import require

Columns: TypeAlias = Mapping[str, tuple[np.dtype, tuple[int, ...]]]

_GOOD, _FAILED = b'\0', b'\1'
_CHUNK = 1 << 20  # bytes read at once for a checksum


def read_dtype(name: str) -> np.dtype:
  """A dtype by name, those that numpy lacks included."""
  return np.dtype(getattr(ml_dtypes, name, name))


def pack(columns: Columns, row: Mapping[str, np.ndarray]) -> bytes:
  """A good row as bytes."""
  parts = [_GOOD]
  for name, (dtype, shape) in columns.items():
    assert row[name].shape == shape, (name, row[name].shape, shape)
    parts.append(np.ascontiguousarray(row[name], dtype).tobytes())
  return b''.join(parts)


def pack_failure(key: str, reason: str) -> bytes:
  """The row of a record that could not be used."""
  return _FAILED + json.dumps([key, reason]).encode()


def unpack(columns: Columns, content: bytes) -> dict[str, np.ndarray]:
  """The arrays of a row; read-only views of the bytes.

  Raises:
    RecordError: the record could not be used; says why.
    ValueError: not a row of these columns.
  """
  if content[:1] == _FAILED:
    raise RecordError(*json.loads(content[1:]))
  if content[:1] != _GOOD:
    raise ValueError(f'a row that starts with {content[:1]!r}')
  at, out = 1, {}
  for name, (dtype, shape) in columns.items():
    out[name] = np.frombuffer(content, dtype, math.prod(shape), at)
    out[name] = out[name].reshape(shape)
    at += out[name].nbytes
  return out


def row_bytes(columns: Columns) -> int:
  """Bytes of a good row."""
  return 1 + sum(
    dtype.itemsize * math.prod(shape) for dtype, shape in columns.values()
  )


def checksum(path: str | os.PathLike) -> str:
  """SHA-256 of a file."""
  digest = hashlib.sha256()
  with open(path, 'rb', buffering=0) as file:
    while block := file.read(_CHUNK):
      digest.update(block)
  return digest.hexdigest()


class ShardWriter:
  """Writes a file beside its place and renames it when it is whole.

  Args:
    path: where it goes.
  """

  def __init__(self, path: pathlib.Path):
    module = require('array_record.python.array_record_module', 'data')
    self.path = path
    self._part = path.with_name(f'{path.name}.part')
    # Pictures and features hardly shrink; what is not packed reads fastest.
    self._writer = module.ArrayRecordWriter(
      str(self._part), 'group_size:1,uncompressed'
    )

  def write(self, content: bytes) -> None:
    """Appends a row."""
    self._writer.write(content)

  def close(self) -> dict[str, Any]:
    """Puts the file in its place; returns its size and checksum."""
    self._writer.close()
    with open(self._part, 'rb') as file:
      os.fsync(file.fileno())
    found = {
      'bytes': self._part.stat().st_size,
      'sha256': checksum(self._part),
    }
    self._part.replace(self.path)
    return found


@dataclasses.dataclass
class Part:
  """Which records of a file are read, in the terms of array_record."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


def open_records(parts: Sequence[Part]) -> Any:
  """Random access to the records of all parts, one after another.

  Readers open at the first read and hold 8 bytes for each record. Those that
  leave the index on disk search it anew for every record.
  """
  module = require('array_record.python.array_record_data_source', 'data')
  return module.ArrayRecordDataSource(list(parts))
