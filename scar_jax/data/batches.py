"""Rows of global batches, by place in the sample stream.

In: a source and the place of each row. Out: the local rows of a batch as numpy
arrays, and the records that could not be used. `Batches` makes rows of the
pictures of a `Source`; `CachedBatches` takes those that `scar tokenize` made.
A row is a function of seed and place alone. Called by `pipeline.py`, and for
the rows of a cache by `scar_jax/precompute.py`.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int64

from scar_jax.data.badrecords import BadRecord
from scar_jax.data.buckets import Buckets
from scar_jax.data.geometry import fit_pictures, to_float
from scar_jax.data.mixture import Mixture
from scar_jax.data.order import mixed_at, mixed_epochs, records_at
from scar_jax.data.records import Record, RecordError, Rows, Source
from scar_jax.data.shards import Columns
from scar_jax.data.text import Text
from scar_jax.types import Batch

# The columns of a batch are those of the first of so many records that loads.
_PROBED = 64
Places = Int64[np.ndarray, ' n']


@dataclasses.dataclass(frozen=True)
class Stream:
  """Random access to the local rows of global batches; picklable."""

  source: Source
  seed: int
  train: bool
  batch: int
  rows: tuple[int, ...]

  def load(self, start: int, k: int) -> tuple[Batch, list[BadRecord]]:
    """The k-th batch from sample `start` on, and its bad records."""
    places = start + k * self.batch + np.asarray(self.rows, np.int64)
    return self.at(places, self.records_at(places))

  def at(
    self, places: Places, records: Places
  ) -> tuple[Batch, list[BadRecord]]:
    """The rows of these places; record -1 is a row that fills up."""
    out = self._empty(len(places))
    valid = np.zeros(len(places), np.bool_)
    bad: list[BadRecord] = []
    listed = zip(
      places.tolist(),
      records.tolist(),
      self.epochs_at(places).tolist(),
      strict=True,
    )
    for row, (place, index, epoch) in enumerate(listed):
      if index < 0:
        continue
      try:
        self._fill(out, row, place, index, epoch)
        valid[row] = True
      except RecordError as error:
        bad.append(BadRecord(place, index, error.key, error.reason))
      except Exception as error:
        raise RuntimeError(
          f'record {index} of {self.source.describe()}: {error!r}'
        ) from error
    if valid.any() and not valid.all():
      # A copy of a real row keeps statistics over the batch in range, where
      # some code forgets `valid`; the mask still takes it out of every loss.
      first = int(np.argmax(valid))
      for column in out.values():
        column[~valid] = column[first]
    out = {name: _wide(column) for name, column in out.items()}
    return out | {'valid': valid, 'index': records.astype(np.int32)}, bad

  def records_at(self, places: Places) -> Places:
    """Record at each place of the stream; -1 is behind the last one."""
    count = len(self.source)
    if self.train and isinstance(self.source, Mixture):
      mixed = self.source
      return mixed_at(places, mixed.counts, mixed.shares, self.seed)
    records = records_at(places, count, self.seed, shuffle=self.train)
    return records if self.train else np.where(places < count, records, -1)

  def epochs_at(self, places: Places) -> Places:
    """How often the data at each place was read whole before."""
    if self.train and isinstance(self.source, Mixture):
      mixed = self.source
      return mixed_epochs(places, mixed.counts, mixed.shares, self.seed)
    return places // len(self.source)

  def _empty(self, n: int) -> dict[str, np.ndarray]:
    raise NotImplementedError

  def _fill(
    self,
    out: dict[str, np.ndarray],
    row: int,
    place: int,
    index: int,
    epoch: int,
  ) -> None:
    raise NotImplementedError


def _wide(column: np.ndarray) -> np.ndarray:
  """Bytes are pictures, in [-1, 1]; small whole numbers are token ids."""
  if column.dtype == np.uint8:
    return to_float(column)
  return column.astype(np.int32) if column.dtype == np.uint16 else column


def shapes_of(
  columns: Columns,
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype of a row in a batch, by column of a cache."""
  return {
    name: (shape, _wide(np.empty(0, dtype)).dtype)
    for name, (dtype, shape) in columns.items()
  }


@dataclasses.dataclass(frozen=True)
class CachedBatches(Stream):
  """Rows that `scar tokenize` made."""

  source: Rows

  def _empty(self, n: int) -> dict[str, np.ndarray]:
    return {
      name: np.zeros((n, *shape), dtype)
      for name, (dtype, shape) in self.source.columns.items()
    }

  def _fill(
    self,
    out: dict[str, np.ndarray],
    row: int,
    place: int,
    index: int,
    epoch: int,
  ) -> None:
    for name, value in self.source.row(index, epoch).items():
      out[name][row] = value


@dataclasses.dataclass(frozen=True)
class Batches(Stream):
  """Rows made of pictures, each time anew; see `pipeline.make_loader`.

  With buckets all rows of a batch have one size, the same on every host, since
  it follows from the place.
  """

  text: Text | None
  size: tuple[int, int]
  augment: bool
  crop_ratio: float
  flip: float
  fit: str
  classes: int
  columns: tuple[str, ...]
  buckets: Buckets | None = None

  def load(self, start: int, k: int) -> tuple[Batch, list[BadRecord]]:
    """The k-th batch from sample `start` on, and its bad records."""
    if self.buckets is None:
      return super().load(start, k)
    # After a change of the batch size the start may lie within a batch.
    number = -(-start // self.batch) + k
    size, records = self.buckets.batch(number, self.batch, self.seed)
    rows = np.asarray(self.rows, np.int64)
    of_size = dataclasses.replace(self, size=size, buckets=None)
    return of_size.at(number * self.batch + rows, records[rows])

  def record(
    self, index: int, place: int
  ) -> tuple[Record, np.random.Generator | None]:
    """The record at a place of the stream, and what draws its crop.

    With augmentation the place says which of a record's forms it is, or with
    the embedded data which record.
    """
    rng = None
    if self.augment or (self.train and (self.crop_ratio > 1 or self.flip)):
      rng = generator(self.seed, place)
    return self.source.load(index, rng if self.augment else None), rng

  def _empty(self, n: int) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {
      'target': np.zeros((n, *self.size, 3), np.uint8)
    }
    if 'condition' in self.columns:
      out['condition'] = np.zeros((n, *self.size, 3), np.uint8)
    out |= {c: np.zeros(n, np.int32) for c in self.columns if c != 'condition'}
    if self.text is not None:
      out['text'] = np.zeros((n, self.text.length), np.int32)
      out['text_mask'] = np.zeros((n, self.text.length), np.bool_)
    return out

  def _fill(
    self,
    out: dict[str, np.ndarray],
    row: int,
    place: int,
    index: int,
    epoch: int,
  ) -> None:
    record, rng = self.record(index, place)
    key = record.key or f'record {index}'
    pictures = self._fit(record, key, rng)
    if record.draw is not None:
      pictures['condition'] = record.draw(pictures['target'])
    # All is judged before anything is written: no half-filled row.
    values: dict[str, Any] = {}
    for name in self.columns:
      if name != 'condition':
        values[name] = _label(record, name, key, self.classes)
    if self.text is not None:
      values['text'], values['text_mask'] = self.text.encode(record.text, key)
    for name, value in (pictures | values).items():
      out[name][row] = value

  def _fit(
    self, record: Record, key: str, rng: np.random.Generator | None
  ) -> dict[str, np.ndarray]:
    pictures = {'target': record.target}
    if 'condition' in self.columns and record.draw is None:
      if record.condition is None:
        raise RecordError(key, 'has no condition picture; other records do')
      pictures['condition'] = record.condition
    for name, picture in pictures.items():
      shape = picture.shape
      good = len(shape) == 3 and shape[2] == 3 and picture.dtype == np.uint8
      if not good or not picture.size:
        raise RecordError(
          key,
          f'{name} is {picture.dtype} {shape}; accepted: uint8 [H, W, 3]',
        )
    place = rng if self.train else None
    return fit_pictures(
      pictures, self.size, self.fit, self.crop_ratio, self.flip, place
    )


def _label(record: Record, name: str, key: str, classes: int) -> int:
  labels = record.meta.get('labels', {})
  value = record.label if name == 'label' else labels.get(name[6:])
  if value is None:
    raise RecordError(key, f'has no {name}; other records do')
  if name == 'label' and classes and not 0 <= value < classes:
    raise RecordError(
      key,
      f'label {value}; accepted: 0 to {classes - 1} (set '
      '--config.text.classes)',
    )
  return value


def generator(seed: int, place: int) -> np.random.Generator:
  """The randomness of one place of the stream, and of nothing else."""
  key = np.array([seed & 0xFFFFFFFFFFFFFFFF, place], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))


def find_columns(source: Source) -> tuple[str, ...]:
  """Names of what every record has, from the first that loads."""
  errors: list[str] = []
  for i in range(min(len(source), _PROBED)):
    try:
      record = source.load(i, None)
    except RecordError as error:
      errors.append(str(error))
      continue
    shown = record.condition is not None or record.draw is not None
    found = ['condition'] if shown else []
    found += ['label'] if record.label is not None else []
    return (*found, *(f'label_{n}' for n in record.meta.get('labels', {})))
  raise ValueError(
    f'{source.describe()}: none of the first {len(errors)} records can be'
    ' used:\n  ' + '\n  '.join(errors[:10])
  )
