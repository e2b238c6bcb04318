"""Several processes train one model: over loopback, with CPU collectives.

Four processes train and are killed; two go on on a mesh of the same size until
one of them gets SIGTERM; one process ends the run on eight devices. The order
of the data is exact throughout; sums over devices come in another order than
in one process, so losses are compared to rounding.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from toy import ToyTask

from scar_jax import cli
from scar_jax.artifacts import fingerprint, load_artifact
from scar_jax.train import tasks
from scar_jax.train.checkpoints import read_json
from scar_jax.train.whole import scan

_HERE = pathlib.Path(__file__).parent
_ROOT = _HERE.parents[1]
_DEVICES, _BATCH = 4, 8


def _words(workdir, steps):
  config = {
    'train.steps': steps,
    'train.save_every': 2,
    'train.log_every': 1,
    'train.picture_every': 4,
    'optim.schedule': 'constant',
    'data.batch': _BATCH,
    'mesh.fsdp': 2,
  }
  return [
    *('train', '--config=configs/scenes.py:edit,smoke', f'--workdir={workdir}'),
    *(f'--config.{name}={value}' for name, value in config.items()),
  ]


def _start(workdir, processes, cache, steps=1000):
  """All processes of one start of the run."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  flags = os.environ['XLA_FLAGS']  # cheap compilation
  flags += f' --xla_force_host_platform_device_count={_DEVICES // processes}'
  env = os.environ | {
    'PYTHONPATH': os.pathsep.join([str(_ROOT), str(_HERE)]),
    'XLA_FLAGS': flags,
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  command = [sys.executable, str(_HERE / 'hosts_run.py')]
  command += _words(workdir, steps)
  command += [f'--coordinator=127.0.0.1:{port}', f'--processes={processes}']
  return [
    subprocess.Popen(
      [*command, f'--process={i}'],
      cwd=_ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]


def _end(children, signal_number=None, timeout=600):
  """Waits for all, after a signal to all; `[(status, stdout, stderr)]`."""
  for child in children:
    if signal_number is not None:
      child.send_signal(signal_number)
  try:
    told = [child.communicate(timeout=timeout) for child in children]
  finally:
    for child in children:
      child.kill()
  return [(c.returncode, *t) for c, t in zip(children, told, strict=True)]


def _wait(children, ready, seconds=600):
  end = time.monotonic() + seconds
  while not ready() and time.monotonic() < end:
    if any(child.poll() is not None for child in children):
      break
    time.sleep(0.05)
  if not ready():
    pytest.fail('\n'.join(err for _, _, err in _end(children, signal.SIGKILL)))


def _losses(workdir):
  file = workdir / 'metrics.jsonl'
  lines = file.read_text().splitlines() if file.exists() else []
  rows = [json.loads(line) for line in lines]
  return [(row['step'], row['loss']) for row in rows]


@pytest.mark.slow
def test_four_processes_are_killed_two_go_on_one_ends(tmp_path, monkeypatch):
  run, cache = tmp_path / 'run', tmp_path / 'xla'
  folder = epath.Path(run / 'checkpoints')
  children = _start(run, 4, cache)
  _wait(children, lambda: len(_losses(run)) > 4 and scan(folder)[0])
  _end(children, signal.SIGKILL)
  kept = scan(folder)[0][-1]

  before = len(_losses(run))
  children = _start(run, 2, cache)
  _wait(children, lambda: len(_losses(run)) > before + 2)
  children[1].send_signal(signal.SIGTERM)
  (first, second) = _end(children)
  assert (first[0], second[0]) == (143, 143), first[2] + second[2]
  # One voice: the second process only tells what is wrong.
  assert 'stopped by SIGTERM at step' in first[1]
  assert 'process 0 of 2' in first[2]
  assert 'process 1 of 2' in second[2]
  assert 'train' not in second[1]
  assert 'parameters:' not in second[2]
  assert _losses(run)[before][0] == kept + 1
  saved = scan(folder)[0][-1]
  assert _losses(run)[-1][0] == saved
  position = read_json(folder, saved, 'data')
  assert position['next_sample'] == saved * _BATCH

  # No step is left: the two processes only write the artifact, each its part.
  (first, second) = _end(_start(run, 2, cache, steps=saved))
  assert (first[0], second[0]) == (0, 0), first[2] + second[2]
  artifact = load_artifact(run)
  assert fingerprint(artifact.config, artifact.params) == artifact.fingerprint
  assert json.loads((run / 'summary.json').read_text())['steps'] == saved

  monkeypatch.setattr(tasks, 'make_task', lambda *_: ToyTask())
  for workdir in (run, tmp_path / 'whole'):
    assert cli.main(_words(workdir, saved + 2)) == 0
  wanted = dict(_losses(tmp_path / 'whole'))
  found = _losses(run)
  assert {step for step, _ in found} == {*wanted}
  np.testing.assert_allclose(
    [loss for _, loss in found], [wanted[step] for step, _ in found], rtol=2e-3
  )
