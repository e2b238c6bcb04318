"""Sweeps: points, going on after kill -9, failures, tables, launch lines."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

from scar_jax.commands.parsing import load_function
from scar_jax.commands.sweep import launch_line
from scar_jax.sweep import execute, results
from scar_jax.sweep.spec import jobs, points, read_spec

ROOT = pathlib.Path(__file__).parents[2]

# Stands for `scar`: notes its call, takes a while, leaves what it would leave.
_SCAR = """
import json, pathlib, sys, time
words = dict(w.lstrip('-').partition('=')[::2] for w in sys.argv[2:])
work = pathlib.Path(words['workdir'])
with open(work.parents[2] / "calls.txt", "a") as f:
  f.write(f'{sys.argv[1]} {work}\\n')
if words.get('config.x') == '2.0' and not (work.parents[2] / 'mended').exists():
  sys.exit('loss is not finite')
if sys.argv[1] == 'train':
  time.sleep(float(words.get('config.sleep', 0)))
  (work / 'artifact').mkdir(parents=True, exist_ok=True)
  (work / 'artifact/config.json').write_text('{}')
else:
  seed = int(work.name[4:])
  value = 10 * float(work.parent.name.partition('=')[2]) + seed
  text = json.dumps({'splits': {'all': {'exact': value, 'deep': {'x': None}}}})
  pathlib.Path(words['json']).write_text(text)
"""


def _spec(**fields):
  base = dict(
    title='Sweep of x',
    config='configs/scenes.py:edit',
    grid=(('x', (1.0, 2.0)),),
    seeds=(0, 1, 2),
    score=('--suite=scenes',),
    measures=(dict(key='all.exact', title='exact'),),
  )
  return read_spec(ConfigDict(base | fields), 'x.py')


@pytest.fixture
def scar(tmp_path):
  """Words before a command that start the stand-in."""
  (tmp_path / 'scar.py').write_text(_SCAR)
  return [sys.executable, str(tmp_path / 'scar.py')]


def _calls(work):
  return (work / 'calls.txt').read_text().split('\n')[:-1]


def test_points_are_grid_by_zip():
  spec = _spec(
    zip=(('k', (1, 2)), ('loss.pres', (0.5, 1.0))),
    grid=(('a.b', ('u', 'v')),),
  )
  names = [name for name, _ in points(spec)]
  assert names == [
    'k=1,pres=0.5,b=u', 'k=1,pres=0.5,b=v',
    'k=2,pres=1.0,b=u', 'k=2,pres=1.0,b=v',
  ]  # fmt: skip


def test_stages_come_first_and_seeds_go_round():
  spec = _spec(
    stages=(dict(name='tok', config='c.py:tokenizer', set=(('a', 1),)),),
    set=(('tokenizer.artifact', '{tok}'), ('x', 7)),
    zip=(('name', ('one', 'two/2')), ('config', ('c1.py', 'c2.py'))),
    grid=(),
    seeds=(0, 5),
  )
  listed = jobs(spec, 'runs/s', {'train.steps': '3'})
  assert [j.name for j in listed] == [
    'stages/tok', 'runs/one/seed0', 'runs/two_2/seed0', 'runs/one/seed5',
    'runs/two_2/seed5',
  ]  # fmt: skip
  train, score = listed[3].commands
  assert train == [
    'train', '--config=c1.py', '--workdir=runs/s/runs/one/seed5',
    '--config.tokenizer.artifact=runs/s/stages/tok', '--config.x=7',
    '--config.train.steps=3', '--config.seed=5',
  ]  # fmt: skip
  assert score[:2] == ['eval', '--workdir=runs/s/runs/one/seed5']
  assert listed[0].commands == [
    ['train', '--config=c.py:tokenizer', '--workdir=runs/s/stages/tok',
     '--config.a=1']
  ]  # fmt: skip
  assert launch_line(listed[1], 'gke').startswith(
    'NAME=runs-one-seed0 CONFIG=c1.py WORKDIR=runs/s/runs/one/seed0 '
    "ARGS='--config.tokenizer.artifact=runs/s/stages/tok --config.x=7"
  )
  assert launch_line(listed[1], 'gke').endswith('bash launch/gke.sh train')
  [_, job, *_] = jobs(spec, 'runs/s', {'text.vocab': 'a b'})
  with pytest.raises(ValueError, match='has white space; accepted'):
    launch_line(job, 'slurm')


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(zip=(('a', (1,)), ('b', (1, 2)))), r"\{'a': 1, 'b': 2\}; accepted"),
    (dict(seeds=(1, 1)), 'accepted: at least one, none twice'),
    (dict(grid=(('a', ()),)), r'a=\(\); accepted: a list of values'),
    (dict(seads=(1,)), "no field 'sweep.seads'"),
    (dict(set=(('a', '{b}'),)), 'names no stage; accepted: none'),
    (dict(grid=(('a', (1, 1)),)), 'points of one name: a=1'),
  ],
)
def test_broken_sweeps_are_told(fields, message):
  with pytest.raises(ValueError, match=message):
    jobs(_spec(**fields), 'runs')


def test_failures_are_reported_and_tried_again(tmp_path, scar):
  said = []
  spec = _spec()
  listed = jobs(spec, str(tmp_path))
  found = execute.run_all(listed, said.append, scar)
  assert [found[j.name].status for j in listed] == ['done', 'failed'] * 3
  assert 'loss is not finite' in found[listed[1].name].error
  assert any('loss is not finite' in line for line in said)
  rows = results.gather(spec, listed, found)
  results.write(spec, rows, tmp_path)
  table = (tmp_path / 'table.md').read_text()
  assert '| x=1.0 | 11.000 ± 1.000 | 3 |' in table
  assert '| x=2.0 | – | 0 |' in table
  assert 'Without a number: x=2.0, seed 0: failed' in table
  assert 'Not tried yet' not in table
  some = dict(list(found.items())[:2])
  results.write(spec, results.gather(spec, listed, some), tmp_path)
  table = (tmp_path / 'table.md').read_text()
  assert 'Not tried yet: 4 of 6 runs.' in table
  assert 'seed 2' not in table
  assert (tmp_path / 'plot.png').read_bytes()[:4] == b'\x89PNG'
  (tmp_path / 'mended').touch()
  before = len(_calls(tmp_path))
  again = execute.run_all(listed, said.append, scar)
  assert {o.status for o in again.values()} == {'done'}
  # Only those that had failed: training and scoring of three.
  assert len(_calls(tmp_path)) - before == 6
  summary = results.over_seeds(results.gather(spec, listed, again))
  assert summary['x=2.0'] == {'n': 3, 'all.exact': (21.0, 1.0)}
  other = jobs(_spec(set=(('y', 1),)), str(tmp_path))
  with pytest.raises(ValueError, match=r'made by other commands: .* -> '):
    execute.run_all(other, said.append, scar)


_MAIN = """
import sys
sys.path.insert(0, {root!r})
from scar_jax.sweep import execute, spec
listed = spec.jobs(spec.read_spec(dict(
  title='t', config='c.py', grid=(('x', (1.0, 3.0)),), seeds=(0, 1),
  set=(('sleep', 0.3),), score=('--suite=scenes',)), 'x.py'), {work!r})
found = execute.run_all(listed, print, {scar!r})
print(sorted(o.status for o in found.values()))
"""


def test_a_killed_sweep_goes_on_without_repeating(tmp_path, scar):
  code = _MAIN.format(root=str(ROOT), work=str(tmp_path), scar=scar)
  command = [sys.executable, '-c', code]
  first = subprocess.Popen(command, stdout=subprocess.PIPE)
  deadline = time.monotonic() + 120
  state = tmp_path / 'runs/x=1.0/seed0/job.json'
  # Into the training of the second run.
  while not state.exists() or len(_calls(tmp_path)) < 3:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  first.send_signal(signal.SIGKILL)
  first.wait()
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.stdout.splitlines()[-1] == "['done', 'done', 'done', 'done']"
  calls = _calls(tmp_path)
  # The killed sweep left its training running: it was waited for, not doubled.
  assert sorted(calls) == sorted(set(calls))
  assert len(calls) == 8


def test_a_job_of_another_process_is_left_alone(tmp_path, scar):
  [job, *_] = jobs(_spec(), str(tmp_path))
  with execute._claimed(pathlib.Path(job.workdir), wait=False) as lock:
    assert lock is not None
    assert execute.run_job(job, scar=scar).status == execute.BUSY
  assert execute.run_job(job, scar=scar).status == execute.DONE


def test_a_signal_stops_the_sweep_but_fails_nothing(tmp_path):
  stub = tmp_path / 'scar'
  stub.write_text('#!/bin/sh\nexit 143\n')
  stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
  listed = jobs(_spec(), str(tmp_path))
  found = execute.run_all(listed, lambda _: None, [str(stub)])
  assert [o.status for o in found.values()] == [execute.STOPPED]
  assert execute.outcome(listed[0]).status == ''


def test_missing_measures_name_what_is_there(tmp_path):
  spec = _spec(measures=(dict(key='all.other', title='x'),))
  [job, *_] = jobs(spec, str(tmp_path))
  os.makedirs(job.workdir)
  job.scores.write_text(json.dumps({'splits': {'all': {'exact': 1}}}))
  with pytest.raises(ValueError, match=r"no 'all.other'.*\['exact'\]"):
    results.measured(spec, job)


@pytest.mark.parametrize('setup', ['scenes', 'openmoji', 'paper'])
@pytest.mark.parametrize(
  'name',
  [
    *('compression', 'ratio', 'delta', 'alignment', 'encoder', 'order'),
    *('injection', 'source', 'all'),
  ],
)
def test_every_run_of_the_shipped_sweeps_has_a_valid_config(name, setup):
  from scar_jax import config as config_lib
  from scar_jax.commands.parsing import load_config

  path = f'{ROOT}/configs/sweeps/{name}.py:{setup}'
  spec = read_spec(load_function(path, 'get_sweep', 'sweep'), path)
  listed = jobs(spec, 'runs')
  assert len(points(spec)) >= 2
  for job in listed:
    if job.seed == 0:
      config_lib.check(load_config(f'{ROOT}/{job.config}', dict(job.overrides)))
