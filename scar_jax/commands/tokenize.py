"""`scar tokenize`: tokens and features of a data set, made once.

In: the config of a training of task 'scar', and what to store. Out: `--out`, a
cache of ArrayRecord shards with `manifest.json`, which `data.source=cache`
reads. What is whole there is verified and kept. Several processes share the
work, each with its own shards.
"""

import pathlib
from typing import Any

from absl import flags

from scar_jax.commands.parsing import Args, load_config
from scar_jax.commands.sampling_flags import required

ABOUT = 'Store tokens and features of a data set for training.'
EXAMPLE = (
  'scar tokenize --config=configs/openmoji.py:edit --out=cache '
  '--config.tokenizer.artifact=runs/tokenizer '
  '--config.encoder.artifact=runs/encoder'
)
WITH_CONFIG = True


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  for name, about in {
    'config': 'Config file of the training, and after a colon its variant.',
    'out': 'Folder of the cache; goes on with what is there.',
    'coordinator': 'HOST:PORT of process 0, on a pod that no scheduler tells.',
  }.items():
    flags.DEFINE_string(name, '', about, flag_values=values)
  flags.DEFINE_bool(
    'features', False,
    'Store features of the encoder in place of the pictures that it sees.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'text_features', False, 'Store features of the frozen T5 in place of ids.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_enum(
    'dtype', 'float32', ('float32', 'bfloat16'), 'Of stored features.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'distributed', None, 'See scar train; only to tell processes apart.',
    flag_values=values,
  )  # fmt: skip
  for name, (default, low, about) in {
    'variants': (1, 1, 'Rows of each record, each with its own crop and '
                 'augmentation: those of so many epochs.'),
    'shard_rows': (1024, 1, 'Rows of a shard.'),
    'batch': (64, 1, 'Rows made together on the devices of a process.'),
    'processes': (None, 1, 'Processes that share the work.'),
    'process': (None, 0, 'Which of them this is, from 0.'),
  }.items():  # fmt: skip
    flags.DEFINE_integer(
      name, default, about, lower_bound=low, flag_values=values
    )


def run(args: Args) -> str:
  """Makes the cache; returns the closing line.

  Raises:
    ValueError: see `precompute.Precompute`.
  """
  given = args.flags
  required(given, EXAMPLE, 'config', 'out')
  if '://' in given.out:
    raise ValueError(
      f'--out={given.out}: accepted: a local or shared folder (shards are '
      'read at random)'
    )
  from scar_jax import config as config_lib
  from scar_jax.commands.console import say
  from scar_jax.data import manifest
  from scar_jax.data.shards import row_bytes
  from scar_jax.precompute import Precompute, Wanted

  process, processes = _share(given)
  config = config_lib.check(load_config(given.config, args.overrides))
  wanted = Wanted(
    features=given.features,
    text_features=given.text_features,
    dtype=given.dtype,
    variants=given.variants,
    shard_rows=given.shard_rows,
    batch=given.batch,
  )
  work, out = Precompute(config, wanted), pathlib.Path(given.out)
  job, size = work.job, row_bytes(work.job.columns)
  mine = len(range(process, job.shards, processes))
  say(
    f'{work.plan.source.describe()}\n{job.records} records x {job.variants} '
    f'variants of {size:,} bytes ({", ".join(job.columns)}): '
    f'{job.rows * size / 1e9:.3f} GB in {job.shards} shards, {mine} of them '
    f'by this process, into {out}'
  )
  kept = 0
  for done in work.make(out, process, processes):
    kept += done['kept']
    if not done['kept']:
      say(
        f'shard {done["shard"]}: {done["failed"]} rows failed, '
        f'{done["rows_per_second"]:.1f} rows/s'
      )
  if kept:
    say(f'{kept} shards were whole already, their checksums right')
  whole = manifest.finish(out, job)
  if whole is None:
    return f'{mine} shards in {out}; other processes make the rest'
  failed = f', listed in {out / manifest.FAILED}' if whole['failed'] else ''
  return (
    f'{out}: {whole["rows"]} rows, {whole["failed"]} failed{failed}; train '
    f'with --config.data.source=cache --config.data.path={out}'
  )


def _share(given: Any) -> tuple[int, int]:
  """Index and number of the processes that share the work.

  Raises:
    ValueError: only one of the two is given, or they are impossible.
  """
  from scar_jax import distributed

  process, processes = given.process, given.processes
  if not given.coordinator and (process, processes) != (None, None):
    # Nothing is exchanged: each works for itself.
    if process is None or processes is None or process >= processes:
      raise ValueError(
        f'--processes={processes} --process={process}; accepted: both, '
        '0 <= process < processes'
      )
    return process, processes
  distributed.start(given.distributed, given.coordinator, processes, process)
  distributed.check_joined()
  import jax

  return jax.process_index(), jax.process_count()
