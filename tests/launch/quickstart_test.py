"""The shell scripts, run with a stand-in for the `scar` command."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

_ROOT = pathlib.Path(__file__).parents[2]

# Appends its arguments to calls.txt and leaves what the real command leaves.
_SCAR = """#!/usr/bin/env bash
echo "$*" >>calls.txt
[ -n "${BREAK:-}" ] && [[ "$*" == *"$BREAK"* ]] && exit 3
for arg in "$@"; do
  case $arg in
    --workdir=*) work=${arg#*=} ;;
    --json=*) json=${arg#*=} ;;
  esac
done
case $1 in
  train) echo '{"compilations": 1}' >"$work/summary.json" ;;
  eval) cp scores.json "$json" ;;
esac
"""
_SPLIT = {
  'n': 8,
  'tone_accuracy': 0.75,
  'tokenizer_tone_accuracy': 1.0,
  'background_psnr': 21.0,
  'tokenizer_background_psnr': 24.0,
}
_SCORES = {'splits': {'new_edit': _SPLIT, 'new_emoji': {**_SPLIT, 'n': 9}}}


@pytest.fixture
def project(tmp_path):
  """A copy of the scripts with an environment that is already set up."""
  shutil.copytree(_ROOT / 'launch', tmp_path / 'launch')
  shutil.copy(_ROOT / 'setup.py', tmp_path)
  (tmp_path / 'scores.json').write_text(json.dumps(_SCORES))
  bin_ = tmp_path / '.venv/bin'
  bin_.mkdir(parents=True)
  (bin_ / 'activate').write_text(f'PATH={bin_}:$PATH\n')
  for name, text in (
    ('scar', _SCAR),
    ('python', '#!/bin/sh\nexec python3 "$@"\n'),
  ):
    (bin_ / name).write_text(text)
    (bin_ / name).chmod(0o755)
  with (tmp_path / 'setup.py').open() as file:
    sum_ = subprocess.check_output('cksum', stdin=file, text=True).strip()
  stamp = tmp_path / '.venv/.installed-data'
  stamp.write_text(f'{tmp_path} {sum_}\n')

  # The settings of the scripts around this test are not meant for it.
  settings = 'OUT', 'SMOKE', 'ABLATIONS', 'PYTHON', 'VENV', 'WORKERS'
  outside = {k: v for k, v in os.environ.items() if k not in settings}

  def run(script='quickstart.sh', **env):
    done = subprocess.run(
      ['bash', f'launch/{script}'],
      cwd=tmp_path,
      env=outside | env,
      text=True,
      capture_output=True,
      check=False,
    )
    calls = tmp_path / 'calls.txt'
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return done, lines

  return tmp_path, run


def test_stages_in_order_and_metrics(project):
  root, run = project
  done, calls = run()
  assert done.returncode == 0, done.stderr
  assert [c.split(' --workdir')[0] for c in calls] == [
    'train --config=configs/openmoji.py:tokenizer',
    'train --config=configs/openmoji.py:encoder',
    'train --config=configs/openmoji.py:edit',
    'eval',
  ]
  out = 'runs/quickstart'
  assert f'--config.tokenizer.artifact={out}/tokenizer' in calls[2]
  assert f'--config.encoder.artifact={out}/encoder' in calls[2]
  assert f'--grid={out}/grid.png' in calls[3]
  metrics = json.loads((root / out / 'metrics.json').read_text())
  assert metrics['compilations'] == 1
  assert metrics['splits'] == _SCORES['splits']
  assert metrics['seconds'] == sum(metrics['stages']['seconds'].values())
  assert 'new_emoji       9   75.0% (100.0%)  21.0 (tok' in done.stdout


def test_second_run_does_nothing_again(project):
  _, run = project
  run()
  done, calls = run()
  assert (done.returncode, calls) == (0, [])
  assert 'edit: done before' in done.stdout


def test_failure_stops_and_the_next_run_goes_on_there(project):
  root, run = project
  done, calls = run(BREAK='openmoji.py:edit')
  assert done.returncode == 3
  assert len(calls) == 3
  assert not (root / 'runs/quickstart/metrics.json').exists()
  done, calls = run()
  assert done.returncode == 0
  assert [c.split()[0] for c in calls] == ['train', 'eval']


def test_smoke_and_ablations(project):
  root, run = project
  done, calls = run(SMOKE='1', ABLATIONS='1')
  assert done.returncode == 0, done.stderr
  variants = [c.split(':')[1].split()[0] for c in calls if 'train' in c]
  assert variants == [
    'tokenizer,smoke',
    'encoder,smoke',
    'edit,smoke',
    'edit,no_source,smoke',
    'edit,no_text,smoke',
  ]
  path = root / 'runs/quickstart_smoke/metrics.json'
  metrics = json.loads(path.read_text())
  assert metrics['no_source'] == metrics['no_text'] == _SCORES['splits']


def test_old_python_is_refused(project):
  root, run = project
  old = root / 'old'
  old.write_text('#!/bin/sh\nexit 1\n')
  old.chmod(0o755)
  done, calls = run(PYTHON=str(old), VENV='elsewhere')
  assert (done.returncode, calls) == (1, [])
  assert 'old is not Python 3.11 or newer' in done.stderr


def test_long_file_is_named(project):
  root, run = project
  for name in ('scar_jax', 'tests', 'configs'):
    (root / name).mkdir()
  assert run('file_length.sh')[0].returncode == 0
  (root / 'scar_jax/long.py').write_text('\n' * 401)
  done, _ = run('file_length.sh')
  assert done.returncode == 1
  assert 'scar_jax/long.py: 401 lines' in done.stderr
