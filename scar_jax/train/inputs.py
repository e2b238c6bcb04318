"""What a run is fed: checks before any compile, task, loader, placed batches.

In: a checked config and the mesh. Out: the task with its loaded artifacts, the
data loader, and batches as global arrays. Called by `train/loop.py`.
"""

import functools
import importlib.metadata
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from scar_jax import config as config_lib
from scar_jax import distributed, paths, sharding
from scar_jax.artifacts import load_artifact
from scar_jax.config import Config
from scar_jax.data.aspects import bucket_sizes
from scar_jax.data.records import Rows
from scar_jax.models.decoder import decoder_size
from scar_jax.train import tasks
from scar_jax.train.metrics import write_json
from scar_jax.types import Batch

_SIZES = 'sizes.npz'
_SURVEY_SECONDS = 24 * 3600  # others wait for so long
_ARTIFACTS = ('tokenizer', 'encoder', 'text')
_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def check_run(config: Config, mesh: Mesh) -> None:
  """Refuses what cannot work on these devices, before anything is built.

  Raises:
    ValueError: a batch, accumulation, host count or tensor axis that does not
      divide.
  """
  hosts = jax.process_count()
  ways = sharding.batch_ways(mesh)
  rows = config_lib.batch_per_device(
    config.data.batch, ways, config.train.accum, min(hosts, ways)
  )
  logging.info(
    'batch %d = %d rows x %d devices x %d microbatches',
    *(config.data.batch, rows, ways, config.train.accum),
  )
  if config.task == 'scar':
    heads = config.model.heads or decoder_size(config.model.size).heads
    config_lib.check_tensor_axis(mesh.shape['tensor'], heads)


def make_task(
  config: Config, mesh: Mesh, task: tasks.Task | None = None
) -> tuple[tasks.Task, dict[str, str]]:
  """The task, and the fingerprints of the frozen artifacts it uses."""
  loaded = {}
  for name in _ARTIFACTS:
    path = getattr(getattr(config, name), 'artifact', '')
    if path:
      loaded[name] = load_artifact(path, mesh=mesh)
      logging.info('%s: %s (%s)', name, path, loaded[name].fingerprint)
  marks = {name: artifact.fingerprint for name, artifact in loaded.items()}
  return task or tasks.make_task(config, loaded), marks


def make_loader(
  config: Config,
  mesh: Mesh | None = None,
  workdir: epath.Path | None = None,
  marks: Mapping[str, str] | None = None,
) -> Any:
  """The training loader that the config describes, of this host's rows.

  Args:
    config: checked.
    mesh: says which rows are this host's; by default equal blocks.
    workdir: where bad records are listed; None lists them in the log alone.
    marks: fingerprints of the run's networks, which those of a cache must be;
      None judges none.
  """
  from scar_jax.data.pipeline import make_loader as make
  from scar_jax.data.sources import make_source
  from scar_jax.data.sources.cache import check_caches
  from scar_jax.data.text import make_text

  data = config.data
  source = make_source(data)
  logging.info('data: %s', source.describe())
  text = config.text
  wanted = text is not None and text.kind in ('byte', 't5')
  if isinstance(source, Rows):
    check_caches(source, config, marks)
    wanted = False
  return make(
    source,
    make_text(text) if wanted else None,
    data.batch,
    data.image_size,
    config.seed,
    train=True,
    augment=data.augment,
    crop_ratio=data.crop_ratio,
    flip=data.flip,
    fit=data.fit,
    classes=text.classes if text is not None and text.kind == 'label' else 0,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    rows=local_rows(mesh, data.batch) if mesh else None,
    workers=data.workers,
    strict=data.strict,
    max_bad_share=data.max_bad_share,
    workdir=None if workdir is None else _local(workdir),
    buckets=_buckets(data, source, workdir) if data.aspects else None,
  )


def _buckets(data: Any, source: Any, workdir: epath.Path | None) -> Any:
  """Which records share a shape; one host looks, and all read what it found.

  The file stays: a resumed run has the buckets that it began with.
  """
  from scar_jax.data import buckets
  from scar_jax.data.records import sized

  sized(source)  # else an error on every host, not on the one that looks
  found = None
  if workdir is None:
    found = buckets.survey_sizes(source)
  elif jax.process_index() == 0:
    found = buckets.stored_sizes(workdir / _SIZES, source)
    if found is None:
      found = buckets.survey_sizes(source)
      buckets.store_sizes(workdir / _SIZES, source, found)
  if workdir is not None:
    distributed.wait_for_all('sizes of pictures', _SURVEY_SECONDS)
    if found is None:
      found = buckets.stored_sizes(workdir / _SIZES, source)
  if found is None:
    raise ValueError(
      f'{workdir / _SIZES if workdir else _SIZES}: process 0 wrote the sizes '
      f'of other data than {source.describe()}, which process '
      f'{jax.process_index()} reads; accepted: the same data.path on all hosts'
    )
  sizes = bucket_sizes(data.aspects, data.image_size, data.aspect_step)
  made = buckets.make_buckets(found, sizes)
  logging.info('records by height x width: %s', made.describe())
  return made


def _local(workdir: epath.Path) -> pathlib.Path | None:
  """A folder that files can be appended to; None in a bucket."""
  return None if paths.is_remote(workdir) else pathlib.Path(workdir)


@functools.lru_cache(maxsize=16)
def local_rows(mesh: Mesh, batch: int) -> tuple[int, ...]:
  """Rows of a global batch that devices of this host hold, in order.

  Hosts that a tensor axis spans hold the same rows; a mesh laid out along the
  wires of a pod need not give a host one block of them.
  """
  where = sharding.batch_sharding(mesh)
  places: Mapping[Any, Any] = where.addressable_devices_indices_map((batch,))
  held = {row for (part,) in places.values() for row in range(batch)[part]}
  return tuple(sorted(held))


def first_batch(loader: Any, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Global shapes of a batch; the loader is put back to where it was."""
  position = loader.get_state()
  local = next(loader)
  loader.set_state(position)
  shapes = {k: (v.shape, v.dtype) for k, v in local.items()}
  listed = ', '.join(f'{k} {d}{list(s)}' for k, (s, d) in shapes.items())
  logging.info('first batch of this host: %s', listed)
  where = sharding.batch_sharding(mesh)
  return {
    k: jax.ShapeDtypeStruct(
      (_global_rows(mesh, shape[0]), *shape[1:]), dtype, sharding=where
    )
    for k, (shape, dtype) in shapes.items()
  }


def batches_of_sizes(
  loader: Any, first: Mapping[str, jax.ShapeDtypeStruct]
) -> list[Mapping[str, jax.ShapeDtypeStruct]]:
  """The batches that will come, where pictures have several shapes.

  Args:
    loader: may have `sizes`, see `data.pipeline.Loader`.
    first: see `first_batch`.
  """

  def of_size(size: tuple[int, int]) -> Mapping[str, jax.ShapeDtypeStruct]:
    pictures = {
      name: first[name].update(shape=(first[name].shape[0], *size, 3))
      for name in ('target', 'condition')
      if name in first
    }
    return {**first, **pictures}

  return [of_size(size) for size in getattr(loader, 'sizes', ())] or [first]


def place_batch(local: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """The rows of this host as parts of global arrays."""
  where = sharding.batch_sharding(mesh)

  def place(value: np.ndarray) -> jax.Array:
    batch = _global_rows(mesh, value.shape[0])
    at = {row: i for i, row in enumerate(local_rows(mesh, batch))}

    def part(index: tuple[slice, ...]) -> np.ndarray:
      rows = range(batch)[index[0]]
      return value[at[rows[0]] : at[rows[0]] + len(rows)]

    shape = (batch, *value.shape[1:])
    return jax.make_array_from_callback(shape, where, part)

  return {k: place(np.asarray(v)) for k, v in local.items()}


def _global_rows(mesh: Mesh, rows: int) -> int:
  """Rows of the global batch of which this host holds so many."""
  ways = sharding.batch_ways(mesh)
  return rows * ways // len(local_rows(mesh, ways))


def write_config(
  workdir: epath.Path, config: Config, fingerprints: Mapping[str, str]
) -> None:
  """Writes the resolved config, versions and commit to `config.json`."""
  if jax.process_index():
    return
  versions = {}
  for package in _PACKAGES:
    versions[package] = importlib.metadata.version(package)
  write_json(
    workdir / 'config.json',
    {
      'config': config_lib.to_dict(config),
      'artifacts': dict(fingerprints),
      'versions': versions,
      'commit': _commit(),
    },
  )


def _commit() -> str:
  """Commit of the source tree, or '' outside one."""
  here = pathlib.Path(__file__).parent
  try:
    found = subprocess.run(
      ['git', 'rev-parse', 'HEAD'],
      cwd=here,
      capture_output=True,
      text=True,
      check=False,
    )
  except OSError:
    return ''
  return found.stdout.strip()
