"""`scar sweep`: many runs of one recipe, and a table of them.

In: `--sweep=FILE:ARG`, `--workdir`. Out: a work directory for every run,
`results.json`, `table.md` and `plot.png`. The same command goes on where it was
stopped, by whatever. With `--launcher` nothing is trained: the commands for a
pod or a cluster are written instead.
"""

import pathlib
import shlex
from typing import Any

from absl import flags

from scar_jax.commands.parsing import Args, load_function
from scar_jax.commands.sampling_flags import required

ABOUT = 'Run a sweep; goes on where it stopped. A table with deviations.'
EXAMPLE = 'scar sweep --sweep=configs/sweeps/delta.py --workdir=runs/delta'
WITH_CONFIG = True
# Launcher -> the words behind its script.
LAUNCHERS = {'slurm': '', 'gke': ' train', 'tpu_vm': ' train'}


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  for name, about in {
    'sweep': 'Sweep file, and after a colon its variant.',
    'workdir': 'Directory of the sweep; created if absent.',
    'jobs': 'With --launcher: file for the commands; the terminal if not '
    'given.',
  }.items():
    flags.DEFINE_string(name, None, about, flag_values=values)
  flags.DEFINE_enum(
    'launcher', None, tuple(LAUNCHERS), 'Write commands for this launcher in '
    'place of training here; call again without it to score and tabulate.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'dry_run', False, 'Only list the runs and how they stand.',
    flag_values=values,
  )  # fmt: skip


def run(args: Args) -> str:
  """Runs what is left; returns the closing line.

  Raises:
    ValueError: a broken sweep file, or runs that failed; all others are done.
  """
  from scar_jax.commands.console import say
  from scar_jax.sweep import execute, results
  from scar_jax.sweep.spec import jobs, read_spec

  given = args.flags
  required(given, EXAMPLE, 'sweep', 'workdir')
  spec = read_spec(
    load_function(given.sweep, 'get_sweep', 'sweep'), given.sweep
  )
  listed = jobs(spec, given.workdir, args.overrides)
  known = {job.name: execute.outcome(job) for job in listed}
  done = sum(o.status == execute.DONE for o in known.values())
  say(
    f'{spec.title}: {len(listed)} runs, {done} done before, into '
    f'{given.workdir}'
  )
  if given.dry_run:
    for job in listed:
      say(f'{known[job.name].status or "to do":<8} {job.name}')
    return ''
  if given.launcher:
    return _emit(given, listed, known)
  outcomes = known | execute.run_all(listed, say)
  rows = results.gather(spec, listed, outcomes)
  workdir = pathlib.Path(given.workdir)
  results.write(spec, rows, workdir)
  for heading, table in results.tables(spec, rows).items():
    say(f'\n{heading}\n\n{table.markdown()}')
  broken = [n for n, o in outcomes.items() if o.status == execute.FAILED]
  if broken:
    raise ValueError(
      f'{len(broken)} of {len(listed)} runs failed: {", ".join(broken)}; the '
      f'others are in {workdir}/table.md; the same command tries them again'
    )
  if any(o.status == execute.STOPPED for o in outcomes.values()):
    raise SystemExit(143)
  return f'{workdir}/table.md, {workdir}/results.json'


def _emit(given: flags.FlagValues, listed: list[Any], known: Any) -> str:
  """Commands of what is left; of the stages first, if they are not done."""
  from scar_jax.commands.console import say
  from scar_jax.eval.report import write_atomic
  from scar_jax.sweep.execute import trained

  left = [job for job in listed if not trained(job)]
  stages = [job for job in left if not job.point]
  lines = ['#!/usr/bin/env bash', 'set -euo pipefail']
  lines += [launch_line(job, given.launcher) for job in stages or left]
  text = '\n'.join(lines) + '\n'
  if given.jobs:
    write_atomic(given.jobs, lambda file: file.write(text.encode()))
  else:
    say(text)
  more = '; the points follow when these stages are trained' if stages else ''
  return (
    f'{len(stages or left)} jobs for launch/{given.launcher}.sh in '
    f'{given.jobs or "the lines above"}{more}'
  )


def launch_line(job: Any, launcher: str) -> str:
  """The command that trains a job on a cluster.

  Raises:
    ValueError: a value with white space, which launchers would cut.
  """
  cut = [word for word in job.words if len(word.split()) != 1]
  if cut:
    raise ValueError(
      f'{job.name}: {cut[0]!r} has white space; accepted: values without '
      '(launchers cut ARGS at spaces)'
    )
  # Names of jobs are letters, digits and dashes on every scheduler.
  plain = ''.join(c if c.isalnum() else '-' for c in job.name.lower())
  values = {
    'NAME': plain.strip('-'),
    'CONFIG': job.config,
    'WORKDIR': job.workdir,
    'ARGS': ' '.join(job.words),
  }
  told = ' '.join(f'{k}={shlex.quote(v)}' for k, v in values.items())
  return f'{told} bash launch/{launcher}.sh{LAUNCHERS[launcher]}'
