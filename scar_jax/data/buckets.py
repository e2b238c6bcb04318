"""Which records share a shape, and which of them a batch holds.

In: a source that tells the sizes of its pictures, and the sizes of batches.
Out: `Buckets`, a pure function from the number of a global batch to its size
and records. Sizes are read once, from the headers of the pictures alone, and
kept in a file, so that a resumed run and every host see the same buckets.
Called by `train/inputs.py`; used by `batches.py`.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import time
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32, Int64

from scar_jax import paths
from scar_jax.data.aspects import Shape, nearest_bucket
from scar_jax.data.order import batch_of_group, records_at
from scar_jax.data.records import RecordError, Source, sized

_THREADS = 16  # a header is a few kilobytes: most of the time is waiting
_CHUNK = 16  # records of one call of a thread: neighbours share a row group
_TOLD = 30.0  # seconds between two words about the progress


@dataclasses.dataclass(frozen=True, eq=False)
class Buckets:
  """Records by the shape that they are trained in; picklable.

  Attributes:
    sizes: (height, width) of the pictures of each bucket, pixels.
    members: the records of each bucket, in the order of the source.
  """

  sizes: tuple[Shape, ...]
  members: tuple[Int32[np.ndarray, ' n'], ...]

  @property
  def counts(self) -> tuple[int, ...]:
    """Records of each bucket."""
    return tuple(len(records) for records in self.members)

  @property
  def used(self) -> tuple[Shape, ...]:
    """Sizes that some record has."""
    return tuple(s for s, n in zip(self.sizes, self.counts, strict=True) if n)

  def batch(
    self, number: int, batch: int, seed: int
  ) -> tuple[Shape, Int64[np.ndarray, ' batch']]:
    """Size and records of a global batch; see `order.batch_of_group`.

    Args:
      number: of the batch, from 0.
      batch: its rows.
      seed: of the order.
    """
    bucket, places = batch_of_group(number, self.counts, batch, seed)
    members = self.members[bucket]
    found = records_at(places, len(members), seed + bucket)
    return self.sizes[bucket], members[found].astype(np.int64)

  def describe(self) -> str:
    """One line for the log."""
    listed = zip(self.sizes, self.counts, strict=True)
    return ', '.join(f'{h}x{w}: {count}' for (h, w), count in listed)


def make_buckets(
  pictures: Int32[np.ndarray, 'n 2'], sizes: Sequence[Shape]
) -> Buckets:
  """Every record in the bucket of the nearest ratio.

  Args:
    pictures: (height, width) of each record, see `survey_sizes`.
    sizes: of the buckets.
  """
  best = nearest_bucket(sizes, pictures)
  members = [
    np.flatnonzero(best == number).astype(np.int32)
    for number in range(len(sizes))
  ]
  return Buckets(tuple(sizes), tuple(members))


def survey_sizes(source: Source) -> Int32[np.ndarray, 'n 2']:
  """(height, width) of every target, from its header; zeros are unreadable.

  A record that cannot be read here is a bad record once it is loaded.

  Raises:
    ValueError: the source does not tell the sizes of its pictures.
  """
  known = sized(source)
  count, started = len(source), time.monotonic()
  told = started

  def some(first: int) -> list[tuple[int, int]]:
    found = []
    for i in range(first, min(first + _CHUNK, count)):
      try:
        found.append(known.size(i))
      except RecordError:
        found.append((0, 0))
    return found

  sizes = np.zeros((count, 2), np.int32)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    starts = range(0, count, _CHUNK)
    for first, found in zip(starts, pool.map(some, starts), strict=True):
      sizes[first : first + len(found)] = found
      if time.monotonic() - told > _TOLD:
        told = time.monotonic()
        logging.info('sizes of %d of %d pictures', first + len(found), count)
  logging.info(
    'sizes of %d pictures in %.1f s, %d of them unreadable',
    *(count, time.monotonic() - started, int((sizes[:, 0] == 0).sum())),
  )
  return sizes


def stored_sizes(
  path: epath.Path, source: Source
) -> Int32[np.ndarray, 'n 2'] | None:
  """The sizes in a file of `store_sizes`; None if it is of other data."""
  if not path.exists():
    return None
  with np.load(io.BytesIO(path.read_bytes())) as stored:
    if str(stored['mark']) == _mark(source):
      return stored['sizes']
  logging.warning(
    '%s is of other data than %s: the sizes are read again, and the order of '
    'records differs from here on',
    *(path, source.describe()),
  )
  return None


def store_sizes(
  path: epath.Path, source: Source, sizes: Int32[np.ndarray, 'n 2']
) -> None:
  """Writes the sizes of a source, whole or not at all."""
  content = io.BytesIO()
  np.savez_compressed(content, mark=np.str_(_mark(source)), sizes=sizes)
  paths.write_bytes(path, content.getvalue())


def _mark(source: Source) -> str:
  """Twelve hex digits that name the data."""
  text = f'{source.describe()} {len(source)}'
  return hashlib.sha256(text.encode()).hexdigest()[:12]
