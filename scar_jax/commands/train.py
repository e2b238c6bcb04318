"""`scar train`: trains what a config file describes.

In: `--config=FILE:VARIANT`, `--workdir`, `--config.a.b=v`. Out: the work
directory of `train/loop.py`.
"""

import signal

from absl import flags

from scar_jax.commands.parsing import Args, load_config

ABOUT = 'Train a tokenizer, an encoder or SCAR; goes on where it stopped.'
EXAMPLE = (
  'scar train --config=configs/openmoji.py:edit --workdir=runs/edit '
  '--config.tokenizer.artifact=runs/tokenizer --config.optim.lr=3e-4'
)
WITH_CONFIG = True


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  flags.DEFINE_string(
    'config', None, 'Config file, and after a colon its variant.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string(
    'workdir', None, 'Directory of this run; created if absent.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'resume', None,
    'True: a checkpoint must be there. False: none may be there. '
    'Not given: go on if there is one.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'distributed', None,
    'True: one process of several, join the others. False: never. '
    'Not given: as Slurm, GKE or Open MPI say.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string(
    'coordinator', '', 'HOST:PORT of process 0, where no scheduler says it.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    'processes', None, 'How many processes there are, with --coordinator.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    'process', None, 'Index of this process from 0, with --coordinator.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string(
    'profile', '',
    'FIRST:LAST steps whose trace is written to the work directory.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'check', False, 'Only judge the config, print it, and stop.',
    flag_values=values,
  )  # fmt: skip


def run(args: Args) -> str:
  """Trains; returns the closing line.

  Raises:
    ValueError: see `config.check` and `train.loop.train`.
    SystemExit: a signal stopped the run; the status is that of a program that
      it ended, so that a scheduler starts the run again.
  """
  import jax

  from scar_jax import config as config_lib
  from scar_jax import distributed
  from scar_jax.commands.console import say
  from scar_jax.train.profile import read_window

  given = args.flags
  for name in ('config',) if given.check else ('config', 'workdir'):
    if not given[name].value:
      raise ValueError(f'scar train needs --{name}. Example: {EXAMPLE}')
  overrides = dict(args.overrides)
  if given.resume is not None:
    overrides['train.resume'] = str(given.resume)
    overrides['train.require_resume'] = str(given.resume)
  config = config_lib.check(load_config(given.config, overrides))
  if given.check:
    return config_lib.to_json(config).rstrip()
  window = read_window(given.profile)
  distributed.start(
    given.distributed, given.coordinator, given.processes, given.process
  )
  distributed.check_joined()
  first = jax.process_index() == 0

  def tell(text: str) -> None:
    if first:
      say(text)

  tell(
    f'training {config.task} from {given.config} for {config.train.steps} '
    f'steps of {config.data.batch} images on {jax.device_count()} '
    f'{jax.devices()[0].platform} device(s), into {given.workdir}'
  )
  from scar_jax.train.loop import train

  summary = train(config, given.workdir, profile=window)
  if summary['stopped']:
    tell(f'stopped by {summary["stopped"]} at step {summary["steps"]}, saved')
    raise SystemExit(128 + signal.Signals[summary['stopped']])
  if not first:
    return ''
  loss = summary['metrics'].get('loss')
  return (
    f'done: {summary["steps"]} steps, '
    + (f'loss {loss:.4f}, ' if loss is not None else '')
    + f'{summary["skipped_steps"]} skipped, {summary["seconds"]:.0f} s; '
    f'artifact in {given.workdir}/artifact'
  )
