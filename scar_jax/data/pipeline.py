"""From a source to batches: grain, sharded by process, resumable anywhere.

In: a `Source`, a text encoder, sizes, a seed. Out: an iterator of
`types.Batch` dicts of numpy arrays, the local rows of each global batch.

Global batch k holds places [k*B, (k+1)*B) of one sample stream and each process
loads the rows of it that its devices hold, so the state is one number, the
next sample, whatever the number of hosts, workers or devices. A record that
cannot be used keeps its place as a row with `valid=False`: no loss, counted,
reported, and no other row moves.
"""

import functools
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
from absl import flags, logging

from scar_jax.data.badrecords import BadRecords
from scar_jax.data.batches import (
  Batches,
  CachedBatches,
  Stream,
  find_columns,
)
from scar_jax.data.buckets import Buckets
from scar_jax.data.geometry import FITS, Size, as_size
from scar_jax.data.records import Rows, Source
from scar_jax.data.text import Text
from scar_jax.types import Batch


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
  buckets: Buckets | None = None,
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
    buckets: sizes of batches in place of `image_size`, and their records, in
      training; see `order.batch_of_group` for the order.

  Raises:
    ValueError: an empty source, no usable record, a batch that does not
      divide, an unknown `fit`, buckets where there can be none.
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
  if buckets is not None and (isinstance(source, Rows) or not train):
    raise ValueError(
      f'data.aspects with {source.describe()}; accepted: pictures, in training'
    )
  if rows is None:
    block = batch // process_count
    rows = range(process_index * block, (process_index + 1) * block)
  if not all(0 <= row < batch for row in rows):
    raise ValueError(
      f'rows {min(rows)} to {max(rows)} of a batch of data.batch={batch}; '
      'accepted: 0 to batch - 1'
    )
  plan: Stream
  if isinstance(source, Rows):
    plan = CachedBatches(source, seed, train, batch, tuple(rows))
  else:
    plan = Batches(
      source=source,
      seed=seed,
      train=train,
      batch=batch,
      rows=tuple(rows),
      text=text,
      size=as_size(image_size),
      augment=train if augment is None else augment,
      crop_ratio=crop_ratio,
      flip=flip if train else 0.0,
      fit=fit,
      classes=classes,
      columns=find_columns(source),
      buckets=buckets,
    )
  name = f'.{process_index}' if process_index else ''
  path = pathlib.Path(workdir) / f'bad_records{name}.jsonl' if workdir else None
  bad = BadRecords(len(source), strict, max_bad_share, path)
  return Loader(plan, bad, workers, threads)


class Loader:
  """Iterator of batches.

  Attributes:
    bad: the bad records met so far, see `badrecords.BadRecords`.
    next_sample: place in the stream of the next global batch.
  """

  def __init__(self, plan: Stream, bad: BadRecords, workers: int, threads: int):
    self.plan = plan
    self.bad = bad
    self._workers = workers
    self._threads = threads
    self.next_sample = 0
    self._iterator: Any = None

  def __len__(self) -> int:
    """Batches of one pass over the source."""
    return -(-len(self.plan.source) // self.plan.batch)

  @property
  def sizes(self) -> tuple[tuple[int, int], ...]:
    """(height, width) of batches, where they have several; else ()."""
    buckets = getattr(self.plan, 'buckets', None)
    return () if buckets is None else buckets.used

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
    load = functools.partial(plan.load, start)
    return read_ahead(load, steps, self._workers, self._threads)

  def get_state(self) -> dict[str, Any]:
    """Plain data for JSON: the place in the stream, and what it depends on."""
    buckets, more = getattr(self.plan, 'buckets', None), {}
    if buckets is not None:  # then the order depends on more
      more = {'batch': self.plan.batch, 'buckets': list(buckets.counts)}
    return {
      'next_sample': self.next_sample,
      'seed': self.plan.seed,
      'records': len(self.plan.source),
      'shares': list(getattr(self.plan.source, 'shares', ())),
      'rows_seen': self.bad.rows,
      'rows_bad': self.bad.count,
      **more,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a state, with any batch size or number of hosts.

    With buckets another batch size is another order of records from here on.

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
    for name in ('seed', 'records', 'shares', 'batch', 'buckets'):
      if name in now and state.get(name, now[name]) != now[name]:
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


def read_ahead(
  load: Callable[[int], Any], steps: int, workers: int, threads: int
) -> Iterable[Any]:
  """`load(0)`, `load(1)`, ... made ahead of time, in order.

  Args:
    load: picklable, if there are workers.
    steps: how many.
    workers: processes; 0 loads in threads.
    threads: of this process, or of each worker.
  """
  # With workers, each has threads of its own; two keep one core busy while
  # a read waits.
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=2 * threads
  )
  dataset = grain.MapDataset.range(steps).map(load).to_iter_dataset(options)
  if not workers:
    return dataset
  if not flags.FLAGS.is_parsed():
    # Grain reads a flag of its own; a program without absl's `app.run` leaves
    # it at its default.
    flags.FLAGS.mark_as_parsed()
  return dataset.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  )
