"""`scar bench reference` around stand-ins of the references."""

import dataclasses
import json
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.bench import reference
from scar_jax.bench.ours import common as ours_common
from scar_jax.bench.ours.common import Ours, gap, same
from scar_jax.bench.theirs import common as theirs_common
from scar_jax.bench.theirs.common import Optimizer, Setting
from scar_jax.cli import main
from scar_jax.config import OptimConfig
from scar_jax.orders.scale import scale_sides

ROOM = len(os.sched_getaffinity(0))
# The process of PyTorch finds these before what is installed.
TORCH = """
__version__ = '9'

def set_num_threads(threads):
  global chosen
  chosen = threads
"""
WORKS = """
import numpy as np
import torch
from scar_jax.bench.theirs.common import Made

MODULES = ('standin.models',)

def good(checkout, size, setting):
  width = checkout.load('standin.models').WIDTH
  seen = [float(size), torch.chosen, width, setting.batch, setting.grid]
  inputs = {'seen': np.array(seen), 'dtype': np.array(setting.dtype)}
  return Made({'net': {}}, inputs, lambda: None, lambda: {'out': np.ones(2)})

def bad(checkout, size, setting):
  raise RuntimeError('out of memory\\nand more')
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A directory with the code of a reference, beside PyTorch's stand-in."""
  (tmp_path / 'standin').mkdir()
  (tmp_path / 'standin/models.py').write_text('WIDTH = 3\n')
  (tmp_path / 'path').mkdir()
  (tmp_path / 'path/torch.py').write_text(TORCH)
  (tmp_path / 'path/works.py').write_text(WORKS)
  path = str(tmp_path / 'path')
  monkeypatch.setenv('PYTHONPATH', path, prepend=os.pathsep)
  return tmp_path


@pytest.fixture
def works(monkeypatch):
  """Works that need no PyTorch; what ours were given."""
  seen = []

  def ours(work, given, setting):
    seen.append((given, setting))
    return Ours(lambda: None, lambda out: (float(out['out'][0]) / 2, 'logits'))

  names = {'var-a/train': ('bad', '1'), 'var-b/sample': ('good', '2')}
  table = {k: reference.Work('var', *v) for k, v in names.items()}
  table['vq/encode'] = reference.Work('llamagen', 'good', '3')
  monkeypatch.setattr(reference, 'WORKS', table)
  monkeypatch.setattr(reference.Work, 'theirs', 'works')
  monkeypatch.setattr(reference.Work, 'ours', ours)
  return seen


def test_a_work_that_fails_is_named_and_the_others_are_measured(
  works, checkout, monkeypatch, capsys
):
  ours = iter([(4.0, 9.0), (3.0, 9.0), (5.0, 8.0), (2.0, 9.0)])
  theirs = iter([(6.0, 6.0), (7.0, 6.0), (8.0, 4.0), (8.0, 5.0)])
  monkeypatch.setattr(reference, 'timed', lambda call: next(ours))
  monkeypatch.setattr(reference.Theirs, 'timed', lambda self: next(theirs))
  out, table = checkout / 'rows.json', checkout / 'rows.md'
  status = main([
    'bench', 'reference', f'--var={checkout}', '--repeats=2', '--grid=4',
    '--batch=3', '--dtype=bfloat16', f'--json={out}', f'--markdown={table}',
  ])  # fmt: skip
  assert status == 0
  report = json.loads(out.read_text())
  failed, row = report['rows']
  assert failed == {
    'work': 'var-a/train', 'threads': ROOM,
    'error': 'RuntimeError: in PyTorch: RuntimeError: out of memory',
  }  # fmt: skip
  del row['load']
  assert row == {
    'work': 'var-b/sample', 'threads': ROOM, 'batch': 3,
    'ours_seconds': 2.0, 'ours_cpu_seconds': 8.0,
    'torch_seconds': 6.0, 'torch_cpu_seconds': 4.0,
    'ratio': 3.0, 'cpu_ratio': 0.5, 'max_abs_diff': 0.5, 'compared': 'logits',
  }  # fmt: skip
  [(given, setting)] = works
  assert setting == Setting(3, 4, dtype='bfloat16', sides=scale_sides(4))
  assert list(given.inputs['seen']) == [2, ROOM, 3, 3, 4]
  assert given.inputs['dtype'] == 'bfloat16'
  assert not given.compiles
  assert report['settings']['torch'] == '9'
  assert report['settings']['dtype'] == 'bfloat16'
  assert '| var-b/sample | – | 2 | 6 | 3 | 0.5 | 0.5 |' in table.read_text()
  shown = capsys.readouterr().out
  assert 'out of memory' in table.read_text()
  assert 'compared' not in shown


def test_nothing_measured_is_an_error(works, checkout, capsys):
  words = [f'--var={checkout}', '--work=var-a/train']
  assert main(['bench', 'reference', *words]) == 1
  told = 'no work could be measured: var-a/train: RuntimeError: in PyTorch'
  assert told in capsys.readouterr().err


def test_our_weights_are_in_int8_where_a_work_says_so(monkeypatch):
  seen = []

  def sample(given, setting, weights=''):
    seen.append(weights)

  module = types.SimpleNamespace(sample=sample)
  monkeypatch.setitem(sys.modules, 'scar_jax.bench.ours.var', module)
  for name in ('var-d12/sample', 'var-d12/sample-int8'):
    reference.WORKS[name].ours(None, Setting())
  assert seen == ['', 'int8']


class Standin:
  """Answers in place of the process of PyTorch."""

  def __init__(self, broken=False):
    self.broken = broken

  def outputs(self):
    return {}

  def timed(self, call='call'):
    if call == 'compiled' and self.broken:
      raise RuntimeError('in PyTorch: OSError: no C++ compiler')
    return {'call': (2.0, 3.0), 'compiled': (1.0, 2.0)}[call]


def test_torch_compile_is_beside_or_its_error():
  ours = Ours(lambda: jnp.ones(2), lambda out: (0.5, 'logits'))
  row = reference.figures(ours, Standin(), True, 1, 1)
  assert row['torch_compile_seconds'] == 1.0
  assert row['torch_compile_ratio'] == pytest.approx(1 / row['ours_seconds'])
  row = reference.figures(ours, Standin(broken=True), True, 1, 1)
  assert row['torch_compile_error'].endswith('OSError: no C++ compiler')
  assert row['ratio'] > 0
  row = reference.figures(ours, Standin(), False, 1, 1)
  assert not [key for key in row if 'compile' in key]


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ([], 'no checkout of a reference is given; accepted: --llamagen=DIR of F'),
    (['--work=var-b/sampl'], "Did you mean 'var-b/sample'? accepted: var-a/t"),
    (['--work=vq/encode', '--var=.'], "--work='vq/encode' without --llamagen"),
    (['--var=nowhere'], "--var='nowhere': no such directory; accepted: a ch"),
    (['--var=.', f'--threads={ROOM + 1}'], f'accepted: 1 to {ROOM}, the cores'),
  ],
)  # fmt: skip
def test_what_cannot_be_measured_is_an_error(
  works, checkout, capsys, words, message
):
  assert main(['bench', 'reference', *words]) == 1
  assert message in capsys.readouterr().err


def test_outputs_are_compared():
  assert gap(np.float32([1, 1]), np.float32([1, 4])) == 3
  with pytest.raises(ValueError, match=r'shapes \(2,\) and \(3,\)'):
    gap(np.zeros(2), np.zeros(3))
  assert same([1, 2, 3], [1, 0, 3], 'codes') == '2 of 3 codes equal'


class Line:
  """A task: a linear map to a target."""

  frozen = types.MappingProxyType({})

  def init(self, rng, batch):
    return {'params': {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(2)}}

  def as_trained(self, params):
    return params

  def loss(self, params, extra, frozen, batch, rng, train):
    out = batch['x'] @ params['kernel'].T + params['bias']
    return jnp.sum((out - batch['y']) ** 2), ({}, extra)


@pytest.mark.slow
def test_training_steps_of_both_sides_are_the_same():
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
  batch = {'x': jnp.float32(x), 'y': jnp.float32(y)}
  given = [theirs_common.to_torch(np.float32(v)) for v in (x, y)]

  def loss(model):
    return ((model(given[0]) - given[1]) ** 2).sum()

  def both(**fields):
    # Large steps, so that each of these shows in the next loss.
    optimizer = Optimizer(lr=0.5, weight_decay=0.3, **fields)
    setting = Setting(optimizer=optimizer)
    model = theirs_common.shaken(torch.nn.Linear(3, 2))
    params = ours_common.on_device(theirs_common.tensors(model))
    params = {'kernel': params['weight'], 'bias': params['bias']}
    ours = ours_common.training(Line(), params, batch, setting)
    theirs = theirs_common.trainer(model, loss, setting)
    return ours, theirs, loss(model).item()

  ours, theirs, start = both()
  losses = theirs['outputs']()
  assert losses['losses'][0] == pytest.approx(start)
  difference, compared = ours.differ(losses)
  assert difference < 1e-4
  assert compared == 'loss of 3 steps'
  assert float(ours.call()) == pytest.approx(float(theirs['call']()), abs=1e-4)
  assert float(ours.call()) < start
  for field in (dict(b1=0.5), dict(b2=0.5), dict(eps=1.0), dict(clip=0.1)):
    ours, theirs, _ = both(**field)
    other = theirs['outputs']()
    assert np.max(np.abs(other['losses'] - losses['losses'])) > 1e-3, field
    assert ours.differ(other)[0] < 1e-4, field


def test_both_sides_train_as_our_recipes_do():
  assert OptimConfig(**dataclasses.asdict(Optimizer())) == OptimConfig()


def test_dropout_leaves_nothing_to_compare():
  params = {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(2)}
  batch = {'x': np.ones((4, 3), np.float32), 'y': np.ones((4, 2), np.float32)}
  for dropout in (True, False):
    own = {k: jnp.array(v) for k, v in params.items()}
    ours = ours_common.training(Line(), own, batch, Setting(dropout=dropout))
    difference, compared = ours.differ({'losses': np.zeros(3)})
    assert compared == (
      'nothing, for dropout' if dropout else 'loss of 3 steps'
    )
    assert difference is None if dropout else difference > 1
