"""Kills a training run again and again, and proves that nothing was lost.

  python tests/train/kills.py --kills=20 --seed=0

In: how many kills. Out: a table of when each came and where the next start
went on, then figures. The run is SIGKILLed at random moments of start-up,
training and saving. Every loss that any of its lives logged must be that of a
run without a kill, bit for bit, and so must the last checkpoint: parameters,
average, moments, counters and loader position.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from scar_jax.train.checkpoints import read_json
from scar_jax.train.whole import scan

_HERE = pathlib.Path(__file__).parent
_ONE_DEVICE = '--xla_force_host_platform_device_count=1'
_MOMENTS = ('start-up', 'training')


def start(workdir, steps, save_every=2):
  """A run of the toy in a process of its own."""
  words = [str(workdir), str(steps), str(save_every)]
  path = os.pathsep.join([str(_HERE.parent.parent), str(_HERE)])
  return subprocess.Popen(
    [sys.executable, str(_HERE / 'toy_run.py'), *words],
    stderr=(workdir / 'log.txt').open('a'),
    env={
      **os.environ,
      'PYTHONPATH': path,
      # A life is short; it should not be spent compiling.
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {_ONE_DEVICE}',
      'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'xla'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    },
  )


def losses(workdir):
  """`[(step, loss)]` as logged; a line that a kill cut short is left out."""
  found = []
  file = workdir / 'metrics.jsonl'
  for line in file.read_text().splitlines() if file.exists() else ():
    try:
      row = json.loads(line)
    except ValueError:
      continue
    found.append((row['step'], row['loss']))
  return found


def kill_once(workdir, rng):
  """Starts the run, kills it, and says when that was."""
  moment = _MOMENTS[rng.random() < 0.8]
  before = len(losses(workdir))
  child = start(workdir, 10**6)
  try:
    if moment == 'start-up':
      time.sleep(rng.uniform(0.0, 3.0))
    else:
      time.sleep(_gap(child, workdir, before, rng.randint(2, 9)) * rng.random())
    assert child.poll() is None, (workdir / 'log.txt').read_text()[-2000:]
  finally:
    child.send_signal(signal.SIGKILL)
    child.wait()
  steps, cut = scan(epath.Path(workdir / 'checkpoints'))
  return {
    'moment': moment,
    'steps': len(losses(workdir)) - before,
    'whole': steps[-1] if steps else 0,
    'cut': len(cut),
  }


def _gap(child, workdir, before, lines):
  """Waits for so many new lines; the seconds from one to the next."""
  begin = None
  while (count := len(losses(workdir))) < before + lines:
    if child.poll() is not None:
      break
    if begin is None and count > before:
      begin = time.monotonic()
    time.sleep(0.005)
  end = time.monotonic()
  return (end - (begin or end)) / (lines - 1)


def stored(workdir, step):
  """All arrays of a checkpoint and the loader position."""
  folder = epath.Path(workdir / 'checkpoints')
  with ocp.PyTreeCheckpointer() as reader:
    trees = {
      item: reader.restore(folder / str(step) / item)
      for item in ('params', 'train_state')
    }
  return trees, read_json(folder, step, 'data')


def compare(killed, whole, steps):
  """Raises unless both runs logged and stored the same."""
  wanted = dict(losses(whole))
  found = losses(killed)
  assert {step for step, _ in found} == set(range(1, steps + 1))
  for step, loss in found:
    assert loss == wanted[step], (step, loss, wanted[step])
  (a, at), (b, there) = stored(killed, steps), stored(whole, steps)
  assert at == there
  jax.tree.map(np.testing.assert_array_equal, a, b)
  return len(found), sum(x.size for x in jax.tree.leaves(a))


def prove(workdir, kills, seed=0, tell=lambda line: None):
  """Kills, resumes, compares; returns figures.

  Args:
    workdir: empty directory.
    kills: how many.
    seed: of the moments.
    tell: gets one line for each kill.
  """
  killed, whole = workdir / 'killed', workdir / 'whole'
  killed.mkdir()
  whole.mkdir()
  rng = random.Random(seed)
  rows = []
  for number in range(kills):
    rows.append(kill_once(killed, rng))
    told = ', '.join(f'{k} {v}' for k, v in rows[-1].items())
    tell(f'kill {number + 1}: {told}')
  # Past all that was logged: a kill may come steps after the last whole save.
  steps = max([rows[-1]['whole'], *(step for step, _ in losses(killed))]) + 2
  assert start(killed, steps).wait() == 0, (killed / 'log.txt').read_text()
  # No checkpoint in between: nothing that a restore could change.
  assert start(whole, steps, save_every=steps).wait() == 0
  logged, values = compare(killed, whole, steps)
  cut = [0, *(row['cut'] for row in rows)]
  return {
    'kills': kills,
    'in_start_up': sum(row['moment'] == 'start-up' for row in rows),
    'left_a_cut_save': sum(a < b for a, b in itertools.pairwise(cut)),
    'steps': steps,
    'losses_equal': logged,
    'values_equal': values,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  begin = time.monotonic()

  def tell(line):
    sys.stdout.write(line + '\n')
    sys.stdout.flush()

  with tempfile.TemporaryDirectory() as folder:
    figures = prove(pathlib.Path(folder), args.kills, args.seed, tell)
  tell(json.dumps(figures | {'seconds': round(time.monotonic() - begin)}))


if __name__ == '__main__':
  main()
