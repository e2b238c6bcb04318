"""Runs the jobs of a sweep one after another; goes on where it stopped.

In: jobs. Out: their work directories, each with `job.json` (commands, status,
seconds, how it failed) and `log.txt`. A job that is done is not started again;
one that failed is reported, does not stop the others, and is tried again by the
next call. Called by `commands/sweep.py`.
"""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scar_jax import paths
from scar_jax.eval.report import write_json
from scar_jax.sweep.spec import Job

SCAR = (sys.executable, '-m', 'scar_jax.cli')
DONE, FAILED, STOPPED, BUSY = 'done', 'failed', 'stopped', 'busy'
_TAIL = 15  # lines of a log that tell why a job failed
# Statuses of a command that a signal ended after it had saved.
_SIGNALS = {128 + signal.SIGTERM, 128 + signal.SIGINT}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a job stands.

  Attributes:
    status: DONE, FAILED, STOPPED by a signal, or BUSY in another process; ''
      is not tried yet.
    seconds: that its last try took.
    error: the end of its log, if it failed.
  """

  status: str = ''
  seconds: float = 0.0
  error: str = ''


def outcome(job: Job) -> Outcome:
  """What `job.json` says.

  Raises:
    ValueError: the directory was made by other commands.
  """
  path = pathlib.Path(job.workdir) / 'job.json'
  try:
    found = json.loads(path.read_text())
  except FileNotFoundError:
    return Outcome()
  if found['commands'] != job.commands:
    changed = [
      f'{" ".join(old)} -> {" ".join(new)}'
      for old, new in zip(found['commands'], job.commands, strict=False)
      if old != new
    ]
    raise ValueError(
      f'{job.workdir} was made by other commands: '
      f'{"; ".join(changed) or "fewer or more of them"}; accepted: the same '
      'sweep, or another --workdir'
    )
  return Outcome(found['status'], found['seconds'], found['error'])


@contextlib.contextmanager
def _claimed(folder: pathlib.Path, wait: bool) -> Iterator[int | None]:
  """A lock that the job's own processes hold too, or None if it is taken.

  A sweep that is killed leaves its training running; as long as that lives,
  nobody else may write into the same directory.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield None
    else:
      yield file.fileno()


def run_job(
  job: Job, wait: bool = False, scar: Sequence[str] = SCAR
) -> Outcome:
  """Trains and scores, unless it is done.

  Args:
    job: what to run.
    wait: for another process that is at it; else the outcome is BUSY.
    scar: the words before a command.

  Raises:
    ValueError: the directory was made by other commands.
  """
  folder = pathlib.Path(job.workdir)
  with _claimed(folder, wait) as lock:
    if lock is None:
      return Outcome(BUSY)
    before = outcome(job)
    if before.status == DONE:
      return before
    started, status, error = time.monotonic(), DONE, ''
    for command in _left(job):
      code = _call([*scar, *command], folder / 'log.txt', lock)
      if code in _SIGNALS:
        return Outcome(STOPPED, time.monotonic() - started)
      if code:
        lines = (folder / 'log.txt').read_text(errors='replace').splitlines()
        end = '\n'.join(lines[-_TAIL:])
        status, error = FAILED, f'scar {command[0]} ended with {code}\n{end}'
        break
    seconds = time.monotonic() - started
    written = {'commands': job.commands, 'status': status, 'error': error}
    write_json(folder / 'job.json', {**written, 'seconds': seconds})
    return Outcome(status, seconds, error)


def trained(job: Job) -> bool:
  """Whether its training has ended, here or on a cluster.

  A run leaves its artifact when it ends.
  """
  return (paths.folder(job.workdir) / 'artifact/config.json').is_file()


def _left(job: Job) -> list[list[str]]:
  """Commands that are not done."""
  train, *rest = job.commands
  return rest if trained(job) else [train, *rest]


def _call(words: list[str], log: pathlib.Path, lock: int) -> int:
  """The status of a command; a signal to us goes on to it."""
  with log.open('ab') as file:
    file.write(f'$ {" ".join(words)}\n'.encode())
    file.flush()
    child = subprocess.Popen(
      words, stdout=file, stderr=subprocess.STDOUT, pass_fds=(lock,)
    )

    def pass_on(number: int, _: Any) -> None:
      # A terminal sends its Ctrl-C to both of us.
      if number != signal.SIGINT:
        child.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    kept = {n: signal.signal(n, pass_on) for n in numbers}
    try:
      code = child.wait()
    finally:
      for n, handler in kept.items():
        signal.signal(n, handler)
  return 128 - code if code in (-signal.SIGTERM, -signal.SIGINT) else code


def run_all(
  jobs: Sequence[Job], say: Callable[[str], None], scar: Sequence[str] = SCAR
) -> dict[str, Outcome]:
  """All jobs in turn; those that another process is at come last.

  A failed stage ends the sweep: all points need it.

  Returns:
    Outcome by the job's name; jobs behind a stop are not in it.
  """
  found: dict[str, Outcome] = {}
  # Stages are waited for: what follows builds on them.
  waiting = [(job, not job.point) for job in jobs]
  while waiting:
    job, wait = waiting.pop(0)
    place = f'[{len(found) + 1}/{len(jobs)}] {job.name}'
    if outcome(job).status != DONE:
      say(f'{place} ...')
    result = run_job(job, wait, scar)
    if result.status == BUSY:
      say(f'{place}: another process is at it, left for later')
      waiting.append((job, True))
      continue
    found[job.name] = result
    say(f'{place}: {result.status}, {result.seconds:.0f} s')
    if result.status == FAILED:
      say(f'  {result.error.splitlines()[-1]} (all in {job.workdir}/log.txt)')
    if result.status == STOPPED or (result.status == FAILED and not job.point):
      break
  return found
