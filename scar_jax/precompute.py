"""What frozen networks make of every record, stored once for training.

In: a checked config of task 'scar', its artifacts, a folder. Out: a cache
there, see `data/manifest.py`: the tokens of every target, and features or
pictures, ids or features of texts: all that a step of this config asks for.
Rows are drawn as training draws them, in batches of one shape under jit. Called
by `scar tokenize`; several processes each make shards of their own.
"""

import collections
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scar_jax import compiler, sharding
from scar_jax.config import Config, MeshConfig
from scar_jax.data import manifest
from scar_jax.data.badrecords import BadRecord, BadRecords
from scar_jax.data.batches import Batches
from scar_jax.data.manifest import Job
from scar_jax.data.order import places_of
from scar_jax.data.pipeline import read_ahead
from scar_jax.data.shards import (
  ShardWriter,
  pack,
  pack_failure,
  read_dtype,
  row_bytes,
)
from scar_jax.models.conditions import given
from scar_jax.parts import to_uint8
from scar_jax.train import inputs
from scar_jax.train.tasks.scar import ScarTask
from scar_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What is stored, besides tokens.

  Attributes:
    features: the encoder's, in place of the pictures it sees.
    text_features: the frozen T5's, in place of ids.
    dtype: of features.
    variants: rows of each record, see `manifest.Job`.
    shard_rows: rows of a shard.
    batch: rows made together.
  """

  features: bool = False
  text_features: bool = False
  dtype: str = 'float32'
  variants: int = 1
  shard_rows: int = 1024
  batch: int = 64


class Precompute:
  """One job on the devices of this process.

  Args:
    config: checked; its artifacts are loaded here.
    wanted: what is stored.

  Attributes:
    job: what will be made.

  Raises:
    ValueError: another task, a mixture, a batch that does not divide, or
      features that the model does not have.
  """

  def __init__(self, config: Config, wanted: Wanted):
    _check(config, wanted)
    self.config, self.wanted = config, wanted
    self.mesh: Mesh = sharding.make_mesh(
      vars(MeshConfig()), jax.local_devices()
    )
    ways = sharding.batch_ways(self.mesh)
    if wanted.batch % ways:
      raise ValueError(
        f'--batch={wanted.batch} is not a multiple of the {ways} devices of '
        f'this process; accepted: {ways}, {2 * ways}, ...'
      )
    task, marks = inputs.make_task(config, self.mesh)
    assert isinstance(task, ScarTask)
    self.task = task
    model = task.editor.model
    if wanted.features and not _has_features(model):
      raise ValueError(
        f'--features with prefix.compress={model.prefix.compress!r}, which has '
        'no features (set --nofeatures)'
      )
    placed = sharding.frozen_shardings(task.frozen, self.mesh)
    self.frozen = jax.device_put(dict(task.frozen), placed)
    data = dataclasses.replace(config.data, batch=wanted.batch)
    loader = inputs.make_loader(
      dataclasses.replace(config, data=data), self.mesh
    )
    assert isinstance(loader.plan, Batches)
    self.plan: Batches = loader.plan
    self._run = jax.jit(self._row_arrays, compiler_options=compiler.options())
    used = {'tokenizer'}
    used |= {'encoder'} if wanted.features else set()
    used |= {'text'} if wanted.text_features else set()
    self.job = Job(
      records=len(self.plan.source),
      variants=wanted.variants,
      shard_rows=wanted.shard_rows,
      columns=self._columns(),
      settings=manifest.settings_of(config),
      made_with={n: m for n, m in marks.items() if n in used}
      | manifest.vocab_mark(config),
    )

  def _columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Of one row, from shapes alone."""
    first = np.zeros(self.wanted.batch, np.int64)
    batch, _ = self.plan.at(first, np.full_like(first, -1))
    shapes = jax.eval_shape(self._row_arrays, self.frozen, batch)
    return {
      name: (read_dtype(x.dtype.name), tuple(x.shape[1:]))
      for name, x in sorted(shapes.items())
    }

  def _row_arrays(
    self, frozen: Mapping[str, PyTree], batch: Batch
  ) -> dict[str, Array]:
    """Columns of a batch; what is not returned is not computed."""
    task, wanted = self.task, self.wanted
    model = task.editor.model
    aligns = bool(task.weights.align) and model.aligns
    # Features of the targets cost a pass of their own.
    cond, target = task.parts.conditions(
      frozen, batch, aligns and wanted.features
    )
    small = model.decoder.vocab <= 1 << 16
    ids = jnp.uint16 if small else jnp.int32
    out = {'tokens': task.known(frozen, batch).astype(ids)}
    if cond.source_tokens is not None:
      out['source_tokens'] = cond.source_tokens.astype(ids)
    if wanted.features:
      out['features'] = given(cond, 'features').astype(wanted.dtype)
      if target is not None:
        out['target_features'] = target.astype(wanted.dtype)
    elif cond.features is not None:
      for name in ('condition', 'target')[: 1 + aligns]:
        out[name] = to_uint8(jnp.asarray(batch[name]))
    if cond.label is not None:
      out['label'] = cond.label
    if cond.text_mask is not None:
      out['text_mask'] = cond.text_mask
      if wanted.text_features:
        out['text_features'] = given(cond, 'text').astype(wanted.dtype)
      else:
        out['text'] = batch['text']
    return out

  def make(
    self, out: pathlib.Path, process: int = 0, processes: int = 1
  ) -> Iterator[dict[str, Any]]:
    """Makes the shards of one process; yields what is done.

    Whole shards are verified and kept, others are made again.

    Args:
      out: folder of the cache.
      process: makes the shards whose number is this, modulo `processes`.
      processes: that share the work, each started with its own number.

    Yields:
      'shard', 'kept', and of those made 'failed' and 'rows_per_second'.

    Raises:
      ValueError: the folder holds rows of another job, the disk is too small,
        or too many records cannot be used.
    """
    job = self.job
    manifest.open_job(out, job)
    missing = []
    for shard in range(process, job.shards, processes):
      if manifest.whole_shard(out, job, shard, verify=True):
        yield {'shard': shard, 'kept': True}
      else:
        missing.append(shard)
    if not missing:
      return
    _check_room(out, job, missing)
    work = Work(self.plan, job, self.wanted.batch, tuple(missing))
    bad = BadRecords(
      job.records, self.config.data.strict, self.config.data.max_bad_share, None
    )
    with jax.set_mesh(self.mesh):
      yield from self._shards(out, work, bad)

  def _shards(
    self, out: pathlib.Path, work: 'Work', bad: BadRecords
  ) -> Iterator[dict[str, Any]]:
    job, started = self.job, time.perf_counter()
    shard = _Shard(out, job, work.shards[0])
    for rows, arrays, failed in self._rows(work):
      bad.add(list(failed.values()), rows=len(rows))
      for at, row in enumerate(rows):
        if row in failed:
          shard.fail(row, failed[row])
        else:
          shard.writer.write(
            pack(job.columns, {name: x[at] for name, x in arrays.items()})
          )
      if rows[-1] == job.rows_of(shard.number)[-1]:
        failures = shard.close()
        now = time.perf_counter()
        speed = len(job.rows_of(shard.number)) / (now - started)
        yield {
          'shard': shard.number,
          'kept': False,
          'failed': failures,
          'rows_per_second': speed,
        }
        started = now
        following = work.shards.index(shard.number) + 1
        if following < len(work.shards):
          shard = _Shard(out, job, work.shards[following])

  def _rows(
    self, work: 'Work'
  ) -> Iterator[tuple[range, dict[str, np.ndarray], dict[int, BadRecord]]]:
    """Numbers, columns and failures of each batch; one is in flight."""
    waiting: collections.deque[Any] = collections.deque()

    def fetched() -> Any:
      rows, arrays, failed = waiting.popleft()
      return rows, jax.device_get(arrays), failed

    workers = self.config.data.workers
    stream = iter(read_ahead(work, len(work), workers, threads=2))
    for k in range(len(work)):
      batch, failed = next(stream)
      placed = inputs.place_batch(batch, self.mesh)
      waiting.append((work.rows(k), self._run(self.frozen, placed), failed))
      if len(waiting) > 1:
        yield fetched()
    while waiting:
      yield fetched()


@dataclasses.dataclass(frozen=True)
class Work:
  """The batches of some shards, `work(k)` for each; picklable."""

  plan: Batches
  job: Job
  batch: int
  shards: tuple[int, ...]

  def __len__(self) -> int:
    return sum(self._batches(shard) for shard in self.shards)

  def _batches(self, shard: int) -> int:
    return -(-len(self.job.rows_of(shard)) // self.batch)

  def rows(self, k: int) -> range:
    """Numbers of the rows of batch `k`; no batch reaches over two shards."""
    full = -(-self.job.shard_rows // self.batch)  # of every shard but the last
    shard, inside = divmod(k, full)
    return self.job.rows_of(self.shards[shard])[inside * self.batch :][
      : self.batch
    ]

  def __call__(self, k: int) -> tuple[Batch, dict[int, BadRecord]]:
    """Batch `k`, filled up to one shape, and its failures by row."""
    rows, job = np.asarray(self.rows(k), np.int64), self.job
    epochs, inside = np.divmod(rows, job.records)
    places = np.empty_like(rows)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      places[here] = places_of(
        inside[here], job.records, self.plan.seed, int(epoch)
      )
    fill = self.batch - len(rows)
    batch, bad = self.plan.at(
      np.pad(places, (0, fill)), np.pad(inside, (0, fill), constant_values=-1)
    )
    row_at = dict(zip(places.tolist(), rows.tolist(), strict=True))
    return batch, {row_at[b.place]: b for b in bad}


class _Shard:
  """A shard on its way."""

  def __init__(self, out: pathlib.Path, job: Job, number: int):
    self.out, self.job, self.number = out, job, number
    self.failed: list[dict[str, Any]] = []
    # Without its description the file counts as half-written.
    manifest.shard_file(out, job, number).unlink(missing_ok=True)
    self.writer = ShardWriter(out / job.name_of(number))

  def fail(self, row: int, bad: BadRecord) -> None:
    """A row in place of a record that cannot be used."""
    self.writer.write(pack_failure(bad.key, bad.reason))
    variant, record = divmod(row, self.job.records)
    self.failed.append(
      {
        'record': record,
        'variant': variant,
        'key': bad.key,
        'reason': bad.reason,
      }
    )

  def close(self) -> int:
    """Puts the shard in its place; returns how many rows failed."""
    found = self.writer.close()
    manifest.write_json(
      manifest.shard_file(self.out, self.job, self.number),
      {'mark': self.job.mark, **found, 'failed': self.failed},
    )
    return len(self.failed)


def _has_features(model: Any) -> bool:
  return model.prefix.compress != 'off' and not model.prefix.from_tokens


def _check(config: Any, wanted: Wanted) -> None:
  if config.task != 'scar':
    raise ValueError(
      f'task={config.task!r}; accepted: scar, whose tokenizer and encoder are '
      'frozen'
    )
  if config.data.mixture or config.data.source == 'cache':
    raise ValueError(
      'data.mixture and data.source=cache cannot be stored; accepted: one '
      'source. Store each part by itself, and mix the caches: '
      "data.mixture=({'source': 'cache', 'path': 'a'}, ...)"
    )
  if config.data.aspects:
    raise ValueError(
      f'data.aspects={",".join(config.data.aspects)}: the rows of a cache have '
      'one shape; accepted: square crops (set --config.data.aspects=)'
    )
  if config.order.name == 'scale' and config.model.token_noise:
    raise ValueError(
      f'model.token_noise={config.model.token_noise} in the scale order draws '
      'new tokens in each step; accepted: 0 (set --config.model.token_noise=0)'
    )
  if wanted.text_features and config.text.kind != 't5':
    raise ValueError(
      f'--text_features with text.kind={config.text.kind!r}; accepted: t5, '
      'whose encoder is frozen (set --notext_features)'
    )


def _check_room(out: pathlib.Path, job: Job, missing: list[int]) -> None:
  rows = sum(len(job.rows_of(shard)) for shard in missing)
  need, free = rows * row_bytes(job.columns), shutil.disk_usage(out).free
  if need > free:
    raise ValueError(
      f'{out}: {rows} rows need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are '
      'free; accepted: fewer --variants, --dtype=bfloat16, --nofeatures, or '
      'another --out'
    )
