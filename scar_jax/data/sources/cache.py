"""Rows that `scar tokenize` made: target tokens, features, ids of texts.

In: `data.path`, its folder; every other field as when it was made. Out: a
source of finished rows (`records.Rows`): nothing is decoded, resized or drawn
while training. With V variants epoch e reads those that were drawn for epoch
e % V, so that the first V epochs are those of training without a cache.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from scar_jax.data import manifest
from scar_jax.data.mixture import Mixture
from scar_jax.data.records import Record, RecordError
from scar_jax.data.shards import Part, open_records, unpack


def make(data_cfg: Any, split: str) -> 'Cache':
  """The source of a `data` section.

  Raises:
    ValueError: no whole cache there, or one of another data section.
  """
  cache = Cache(data_cfg.path)
  manifest.check_data(data_cfg.path, cache.job, data_cfg, split)
  return cache


class Cache:
  """Rows of one cache.

  Args:
    folder: with `manifest.json` and the shards.

  Attributes:
    job: what the rows were made from.
    columns: name -> dtype and shape of one row.

  Raises:
    ValueError: no manifest, or a shard is missing or of another size.
  """

  def __init__(self, folder: str):
    self.folder = pathlib.Path(folder).absolute()
    self.job, whole = manifest.read_manifest(self.folder)
    self.columns = dict(self.job.columns)
    self.failed = whole.get('failed', 0)
    again = 'run scar tokenize with the same --config and --out again'
    if 'shards' not in whole:
      raise ValueError(f'the cache {folder} is not finished; {again}')
    for shard in whole['shards']:
      path = self.folder / shard['file']
      size = path.stat().st_size if path.is_file() else None
      if size != shard['bytes']:
        found = 'missing' if size is None else f'of {size} bytes'
        raise ValueError(
          f'shard {path} is {found}; expected {shard["bytes"]} bytes: {again}, '
          'which makes this shard anew'
        )
    self._open()

  def _open(self) -> None:
    job = self.job
    parts = []
    for shard in range(job.shards):
      count = len(job.rows_of(shard))
      path = str(self.folder / job.name_of(shard))
      parts.append(Part(path, 0, count, count))
    self._reader = open_records(parts)

  def __len__(self) -> int:
    return self.job.records

  def describe(self) -> str:
    job = self.job
    return (
      f'cache {self.folder}: {len(self)} records x {job.variants} variants of '
      f'{job.settings.get("data.source")}, {", ".join(self.columns)}; '
      f'{self.failed} rows failed'
    )

  def row(self, i: int, epoch: int) -> dict[str, np.ndarray]:
    """The row of record `i`, as it was drawn for an epoch.

    Raises:
      RecordError: the record could not be used, or its shard is damaged.
    """
    number = epoch % self.job.variants * len(self) + i
    try:
      return unpack(self.columns, self._reader[number])
    except RecordError:
      raise
    except Exception as error:
      # array_record raises RuntimeError and ValueError with its own texts.
      shard, inside = divmod(number, self.job.shard_rows)
      raise RecordError(
        f'{self.job.name_of(shard)}/{inside}',
        f'cannot be read: {error}; scar tokenize with the same --config and '
        '--out finds damaged shards and makes them anew',
      ) from error

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Always an error: there are no pictures here."""
    del i, rng
    raise ValueError(
      f'the cache {self.folder} holds rows of a batch, not pictures; '
      f'accepted: data.source={self.job.settings.get("data.source")}, from '
      'which it was made'
    )

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_reader': None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()


class CacheMixture(Mixture):
  """Several caches as one source of rows; see `Mixture`.

  Raises:
    ValueError: their rows have other columns, besides the errors of `Mixture`.
  """

  parts: tuple[Cache, ...]

  @property
  def columns(self) -> dict[str, Any]:
    """Of every part."""
    return self.parts[0].columns

  def row(self, i: int, epoch: int) -> dict[str, np.ndarray]:
    """Row of record `i` of all, in the order of the parts."""
    part, inside = self.place_of(i)
    return self.parts[part].row(inside, epoch)


def check_caches(
  source: Any, config: Any, marks: Mapping[str, str] | None
) -> None:
  """Refuses caches that the networks and texts of a run would not make.

  Args:
    source: a `Cache` or a `CacheMixture`.
    config: checked, of the run.
    marks: see `manifest.check_networks`.

  Raises:
    ValueError: names fields and fingerprints, in the cache and here.
  """
  if config.task != 'scar':
    raise ValueError(
      f'data.source=cache with task={config.task!r}, which trains on pictures; '
      'accepted: task scar'
    )
  for cache in getattr(source, 'parts', (source,)):
    manifest.check_networks(str(cache.folder), cache.job, config, marks)
