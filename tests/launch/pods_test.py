"""The launchers of pods and clusters, with DRY_RUN=1: what they would do."""

import os
import pathlib
import subprocess

import pytest

from scar_jax.commands import parsing, train

_ROOT = pathlib.Path(__file__).parents[2]
_RUN = {
  'DRY_RUN': '1',
  'CONFIG': 'configs/scenes.py:edit',
  'WORKDIR': 'gs://bucket/a run',
  'ARGS': '--config.data.batch=512 --config.mesh.fsdp=16',
}
_TPU = {'TPU': 'pod', 'ZONE': 'z-1', 'TYPE': 'v5litepod-16'}
_GKE = {
  'NAME': 'edit-1',
  'CLUSTER': 'mine',
  'ZONE': 'z-1',
  'TYPE': 'v5litepod-256',
  'IMAGE': 'registry/scar:1',
}


def _launch(script, *actions, **env):
  """Status, the commands as lists of words, and what is told beside them."""
  done = subprocess.run(
    ['bash', f'launch/{script}.sh', *actions],
    cwd=_ROOT,
    env={'PATH': os.environ['PATH'], **env},
    text=True,
    capture_output=True,
    check=False,
  )
  lines = done.stdout.splitlines()
  return done.returncode, [_words(line) for line in lines], done.stderr


def _words(line):
  """A line of shell as the words that the shell makes of it."""
  split = subprocess.run(
    ['bash', '-c', 'eval "set -- $1"; printf "%s\\0" "$@"', '-', line],
    text=True,
    capture_output=True,
    check=True,
  )
  return split.stdout.split('\0')[:-1]


def _option(command, name):
  (value,) = [w for w in command if w.startswith(f'{name}=')]
  return value.partition('=')[2]


def _check_training(line):
  """The line is the command that `scar train` reads as meant."""
  words = _words(line)
  assert words[:3] == ['exec', 'scar', 'train']
  args = parsing.parse('train', words[3:], train.define, True)
  assert args.flags.config == _RUN['CONFIG']
  assert args.flags.workdir == _RUN['WORKDIR']
  assert args.flags.distributed is True
  assert args.overrides == {'data.batch': '512', 'mesh.fsdp': '16'}


def test_tpu_slice_from_nothing_to_training():
  status, commands, _ = _launch(
    'tpu_vm', 'create', 'setup', 'train', **_RUN, **_TPU, SPOT='1'
  )
  assert status == 0
  create, archive, copy, install, start = commands
  assert create[:3] == ['gcloud', 'compute', 'tpus']
  assert create[3:6] == ['queued-resources', 'create', 'pod']
  assert _option(create, '--runtime-version') == 'v2-alpha-tpuv5-lite'
  assert '--spot' in create
  assert archive[:2] == ['git', 'archive']
  for command in (copy, install, start):
    assert '--worker=all' in command
    assert '--zone=z-1' in command
  assert 'set_up tpu,gcs' in _option(install, '--command')
  shell = _option(start, '--command')
  background = next(x for x in shell.splitlines() if x.startswith('nohup'))
  _check_training(_words(background.partition(' >')[0])[4])


def test_tpu_slice_stops_saving_and_is_given_back():
  status, (stop, delete), _ = _launch(
    'tpu_vm', 'stop', 'delete', **_RUN, **_TPU
  )
  assert status == 0
  assert 'kill -TERM' in _option(stop, '--command')
  assert '--worker=all' in stop
  assert delete[3:6] == ['queued-resources', 'delete', 'pod']


def test_gke_workload():
  status, (build, push, create), _ = _launch(
    'gke', 'image', 'train', **_RUN, **_GKE, SLICES='2', XPK='--spot'
  )
  assert status == 0
  assert build[:3] == ['docker', 'build', '--file=launch/Dockerfile']
  assert push == ['docker', 'push', 'registry/scar:1']
  assert create[:4] == ['xpk', 'workload', 'create', '--workload=edit-1']
  assert {'--num-slices=2', '--spot', '--max-restarts=100'} <= {*create}
  assert _option(create, '--termination-grace-period-seconds') == '120'
  _check_training(_option(create, '--command'))


def test_slurm_job_is_queued_again_after_it_saved(tmp_path):
  status, (_, job), _ = _launch(
    'slurm', **_RUN, NODES='4', PARTITION='gpu', GRACE='60'
  )
  assert status == 0
  wanted = {'sbatch', '--nodes=4', '--ntasks-per-node=8', '--partition=gpu'}
  assert {*wanted, '--signal=TERM@60', '--requeue'} <= {*job}
  script = _option(job, '--wrap')
  (step,) = [x for x in script.splitlines() if x.startswith('srun')]
  _check_training(_words(step)[4])
  # The script itself, with stand-ins for Slurm.
  for said, wanted in (('143', 'requeue 7'), ('1', ''), ('0', '')):
    stand_ins = f'srun() {{ return {said}; }}; scontrol() {{ echo "$@"; }}\n'
    body = script.replace('exec scontrol', 'scontrol')
    done = subprocess.run(
      ['bash', '-c', stand_ins + body.replace('. .venv/bin/activate', '')],
      env={'SLURM_JOB_ID': '7'},
      text=True,
      capture_output=True,
      check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (int(said), wanted)


@pytest.mark.parametrize(
  ('script', 'actions', 'env', 'message'),
  [
    ('tpu_vm', (), {}, 'needs TPU ZONE'),
    ('tpu_vm', ('train',), _TPU, 'needs CONFIG WORKDIR'),
    ('tpu_vm', ('start',), _TPU, 'start: accepted: create, setup, train'),
    ('tpu_vm', ('create',), _TPU | {'TYPE': 'v9-8'}, 'TYPE=v9-8: set RUNTIME'),
    ('gke', ('image',), {**_GKE, 'IMAGE': ''}, 'needs IMAGE'),
    ('gke', ('go',), _GKE, 'go: accepted: image, train, list, stop'),
    ('slurm', (), {'CONFIG': 'x'}, 'needs WORKDIR'),
  ],
)
def test_what_is_missing_or_unknown_is_told(script, actions, env, message):
  status, commands, told = _launch(script, *actions, DRY_RUN='1', **env)
  assert (status, commands) == (2, [])
  assert message in told


def test_the_image_has_what_it_installs_from():
  text = (_ROOT / 'launch/Dockerfile').read_text()
  copied = [
    word
    for line in text.splitlines()
    if line.startswith('COPY')
    for word in line.split()[1:-1]
  ]
  assert all((_ROOT / word).exists() for word in copied)
  extras = (_ROOT / 'setup.py').read_text()
  for extra in text.partition('ARG EXTRA=')[2].split()[0].split(','):
    assert f"'{extra}':" in extras
