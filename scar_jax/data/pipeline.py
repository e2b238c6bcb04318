"""From a source to batches: grain, sharded by process, resumable anywhere.

In: a `Source`, a text encoder, sizes, a seed. Out: an iterator of
`types.Batch` dicts of numpy arrays, the local rows of each global batch.

Global batch k holds places [k*B, (k+1)*B) of one sample stream and each process
loads the rows of it that its devices hold, so the state is one number, the
next sample, whatever the number of hosts, workers or devices. A record that
cannot be used keeps its place as a row with `valid=False`: no loss, counted,
reported, and no other row moves.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from scar_jax.data.badrecords import BadRecord, BadRecords
from scar_jax.data.geometry import (
  FITS,
  Size,
  as_size,
  fit_pictures,
  to_float,
)
from scar_jax.data.mixture import Mixture
from scar_jax.data.order import mixed_at, records_at
from scar_jax.data.records import Record, RecordError, Source
from scar_jax.data.text import Text
from scar_jax.types import Batch

# The columns of a batch are those of the first of so many records that loads.
_PROBED = 64


def make_loader(
  source: Source,
  text: Text | None,
  batch: int,
  image_size: Size,
  seed: int = 0,
  train: bool = True,
  *,
  augment: bool | None = None,
  crop_ratio: float = 1.0,
  flip: float = 0.0,
  fit: str = 'crop',
  classes: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  rows: Sequence[int] | None = None,
  workers: int = 0,
  threads: int = 2,
  strict: bool = False,
  max_bad_share: float = 0.05,
  workdir: str | pathlib.Path | None = None,
) -> 'Loader':
  """An iterator of batches.

  Args:
    source: random access to records.
    text: encoder of `Record.text`; None leaves the text out of the batch.
    batch: rows of a global batch.
    image_size: of target and condition.
    seed: of shuffling, augmentation and crops.
    train: True is endless and shuffled; False is each record once, in order,
      the last batch filled up with rows of `valid=False`.
    augment: hand the source a generator; None is `train`.
    crop_ratio: see `geometry.crop`; above 1 the place is random in training.
    flip: chance that the pictures of a record are mirrored, in training.
    fit: see `geometry.fit_pictures`.
    classes: labels are below this number; 0 accepts any.
    process_index: this host.
    process_count: hosts that share the global batch.
    rows: numbers of the rows of a global batch that this host loads, in the
      order wanted; by default the process_index-th of equal blocks.
    workers: loader processes of this host; 0 loads in threads.
    threads: loader threads, without workers.
    strict: the first bad record stops the run.
    max_bad_share: of bad rows, above which the run stops.
    workdir: where `bad_records.jsonl` is written; None writes nothing.

  Raises:
    ValueError: an empty source, no usable record, a batch that does not
      divide, an unknown `fit`.
  """
  if len(source) == 0:
    raise ValueError(f'{source.describe()}: 0 records, nothing to load')
  if process_count < 1 or not 0 <= process_index < process_count:
    raise ValueError(
      f'process {process_index} of {process_count}; accepted: 0 to count - 1'
    )
  if rows is None and (batch < 1 or batch % process_count):
    low = max(1, batch // process_count) * process_count
    raise ValueError(
      f'data.batch={batch} is not a multiple of the {process_count} hosts;'
      f' the nearest are {low} and {low + process_count} (set'
      ' --config.data.batch)'
    )
  if fit not in FITS:
    raise ValueError(f'fit={fit!r}; accepted: {", ".join(FITS)}')
  if rows is None:
    block = batch // process_count
    rows = range(process_index * block, (process_index + 1) * block)
  if not all(0 <= row < batch for row in rows):
    raise ValueError(
      f'rows {min(rows)} to {max(rows)} of a batch of data.batch={batch}; '
      'accepted: 0 to batch - 1'
    )
  plan = Batches(
    source=source,
    text=text,
    size=as_size(image_size),
    seed=seed,
    train=train,
    augment=train if augment is None else augment,
    crop_ratio=crop_ratio,
    flip=flip if train else 0.0,
    fit=fit,
    classes=classes,
    batch=batch,
    rows=tuple(rows),
    columns=_columns(source),
  )
  name = f'.{process_index}' if process_index else ''
  path = pathlib.Path(workdir) / f'bad_records{name}.jsonl' if workdir else None
  bad = BadRecords(len(source), strict, max_bad_share, path)
  return Loader(plan, bad, workers, threads)


def _columns(source: Source) -> tuple[str, ...]:
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


@dataclasses.dataclass(frozen=True)
class Batches:
  """Random access to the local rows of global batches; picklable."""

  source: Source
  text: Text | None
  size: tuple[int, int]
  seed: int
  train: bool
  augment: bool
  crop_ratio: float
  flip: float
  fit: str
  classes: int
  batch: int
  rows: tuple[int, ...]
  columns: tuple[str, ...]

  def load(self, start: int, k: int) -> tuple[Batch, list[BadRecord]]:
    """The k-th batch from sample `start` on, and its bad records."""
    n, size = len(self.rows), self.size
    places = start + k * self.batch + np.asarray(self.rows, np.int64)
    records = self.records_at(places)
    out: dict[str, np.ndarray] = {'target': np.zeros((n, *size, 3), np.uint8)}
    if 'condition' in self.columns:
      out['condition'] = np.zeros((n, *size, 3), np.uint8)
    out |= {c: np.zeros(n, np.int32) for c in self.columns if c != 'condition'}
    if self.text is not None:
      out['text'] = np.zeros((n, self.text.length), np.int32)
      out['text_mask'] = np.zeros((n, self.text.length), np.bool_)
    valid = np.zeros(n, np.bool_)
    bad: list[BadRecord] = []
    for row, (place, index) in enumerate(
      zip(places.tolist(), records.tolist(), strict=True)
    ):
      if index < 0:
        continue
      try:
        self._fill(out, row, place, index)
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
    pictures = [c for c in ('target', 'condition') if c in out]
    out |= {c: to_float(out[c]) for c in pictures}
    out |= {'valid': valid, 'index': records.astype(np.int32)}
    return out, bad

  def records_at(self, places: np.ndarray) -> np.ndarray:
    """Record at each place of the stream; -1 is behind the last one."""
    count = len(self.source)
    if self.train and isinstance(self.source, Mixture):
      mixed = self.source
      return mixed_at(places, mixed.counts, mixed.shares, self.seed)
    records = records_at(places, count, self.seed, shuffle=self.train)
    return records if self.train else np.where(places < count, records, -1)

  def _fill(
    self, out: dict[str, np.ndarray], row: int, place: int, index: int
  ) -> None:
    rng = None
    if self.augment or (self.train and (self.crop_ratio > 1 or self.flip)):
      rng = generator(self.seed, place)
    record = self.source.load(index, rng if self.augment else None)
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


class Loader:
  """Iterator of batches.

  Attributes:
    bad: the bad records met so far, see `badrecords.BadRecords`.
    next_sample: place in the stream of the next global batch.
  """

  def __init__(
    self, plan: Batches, bad: BadRecords, workers: int, threads: int
  ):
    self.plan = plan
    self.bad = bad
    self._workers = workers
    self._threads = threads
    self.next_sample = 0
    self._iterator: Any = None

  def __len__(self) -> int:
    """Batches of one pass over the source."""
    return -(-len(self.plan.source) // self.plan.batch)

  def __iter__(self) -> 'Loader':
    return self

  def __next__(self) -> Batch:
    """The next batch.

    Raises:
      RecordError: strict, and a record is bad.
      ValueError: too large a share of bad records.
      StopIteration: after the last batch of an evaluation.
    """
    if self._iterator is None:
      self._iterator = iter(self._dataset())
    batch, bad = next(self._iterator)
    self.next_sample += self.plan.batch
    self.bad.add(bad, rows=int((batch['index'] >= 0).sum()))
    passed, last = divmod(self.next_sample, len(self.plan.source))
    if last < self.plan.batch and passed:
      self.bad.report_epoch(passed)
    return batch

  def _dataset(self) -> Any:
    start, plan = self.next_sample, self.plan
    steps = sys.maxsize
    if not plan.train:
      steps = -(-max(0, len(plan.source) - start) // plan.batch)
    batches = grain.MapDataset.range(steps).map(
      functools.partial(plan.load, start)
    )
    # With workers, each has threads of its own; two keep one core busy while
    # a read waits.
    options = grain.ReadOptions(
      num_threads=self._threads, prefetch_buffer_size=2 * self._threads
    )
    dataset = batches.to_iter_dataset(options)
    if self._workers:
      if not flags.FLAGS.is_parsed():
        # Grain reads a flag of its own; a program without absl's `app.run`
        # leaves it at its default.
        flags.FLAGS.mark_as_parsed()
      dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=self._workers, per_worker_buffer_size=2
        )
      )
    return dataset

  def get_state(self) -> dict[str, Any]:
    """Plain data for JSON: the place in the stream, and what it depends on."""
    return {
      'next_sample': self.next_sample,
      'seed': self.plan.seed,
      'records': len(self.plan.source),
      'shares': list(getattr(self.plan.source, 'shares', ())),
      'rows_seen': self.bad.rows,
      'rows_bad': self.bad.count,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a state, with any batch size or number of hosts.

    Raises:
      ValueError: not a state of a loader.
    """
    sample = state.get('next_sample')
    if not isinstance(sample, int) or sample < 0:
      raise ValueError(
        f'loader state {state!r} has no next_sample >= 0; is it from another'
        ' program?'
      )
    now = self.get_state()
    for name in ('seed', 'records', 'shares'):
      if state.get(name, now[name]) != now[name]:
        logging.warning(
          'the checkpoint was written with %s=%s, now it is %s: the order of'
          ' records differs from here on',
          name,
          state[name],
          now[name],
        )
    self.close()
    self.next_sample = sample
    self.bad.rows = state.get('rows_seen', 0)
    self.bad.count = state.get('rows_bad', 0)

  def close(self) -> None:
    """Stops threads and workers; the next batch starts them again."""
    if self._iterator is not None and hasattr(self._iterator, 'close'):
      self._iterator.close()
    self._iterator = None
