"""`scar bench reference` around stand-ins of the references."""

import json
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.bench import reference, torch_side
from scar_jax.bench.torch_side import Checkout, Pair, Setting, gap, same
from scar_jax.cli import main

ROOM = len(os.sched_getaffinity(0))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A directory with a module, which is forgotten again."""
  (tmp_path / 'standin').mkdir()
  (tmp_path / 'standin/models.py').write_text('WIDTH = 3\n')
  (tmp_path / 'standin/broken.py').write_text('import no_such_package\n')
  monkeypatch.setattr(sys, 'path', list(sys.path))
  yield tmp_path
  for name in [n for n in sys.modules if n.split('.')[0] == 'standin']:
    del sys.modules[name]


def _pair(difference=0.5, compiled=None):
  return Pair(
    lambda: jnp.ones(2), lambda: None, lambda: (difference, 'logits'), compiled
  )


@pytest.fixture
def works(monkeypatch):
  """Works of a module that needs no PyTorch."""
  seen = []

  def good(given, size, setting):
    seen.append((given.path, size, setting))
    return _pair()

  def bad(*_):
    raise RuntimeError('out of memory\nand more')

  module = types.SimpleNamespace(
    MODULES=('standin.models',), good=good, bad=bad, seen=seen
  )
  monkeypatch.setitem(sys.modules, 'scar_jax.bench.reference_var', module)
  names = {'var-a/train': ('bad', '1'), 'var-b/sample': ('good', '2')}
  table = {k: reference.Work('var', *v) for k, v in names.items()}
  table['vq/encode'] = reference.Work('llamagen', 'good', '3')
  monkeypatch.setattr(reference, 'WORKS', table)
  torch = types.SimpleNamespace(set_num_threads=seen.append, __version__='9')
  monkeypatch.setattr(reference, 'require', lambda *_: torch)
  return module


def test_a_work_that_fails_is_named_and_the_others_are_measured(
  works, checkout, monkeypatch, capsys
):
  # Ours twice, theirs twice; again.
  first = [(4.0, 9.0), (3.0, 9.0), (6.0, 6.0), (7.0, 6.0)]
  costs = iter([*first, (5.0, 8.0), (2.0, 9.0), (8.0, 4.0), (8.0, 5.0)])
  monkeypatch.setattr(reference, 'timed', lambda call: next(costs))
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
    'error': 'RuntimeError: out of memory',
  }  # fmt: skip
  del row['load']
  assert row == {
    'work': 'var-b/sample', 'threads': ROOM, 'batch': 3,
    'ours_seconds': 2.0, 'ours_cpu_seconds': 8.0,
    'torch_seconds': 6.0, 'torch_cpu_seconds': 4.0,
    'ratio': 3.0, 'cpu_ratio': 0.5, 'max_abs_diff': 0.5, 'compared': 'logits',
  }  # fmt: skip
  setting = Setting(3, 4, dtype='bfloat16')
  assert works.seen == [ROOM, (str(checkout), '2', setting)]
  assert report['settings']['torch'] == '9'
  assert report['settings']['dtype'] == 'bfloat16'
  assert '| var-b/sample | – | 2 | 6 | 3 | 0.5 | 0.5 |' in table.read_text()
  shown = capsys.readouterr().out
  assert 'out of memory' in table.read_text()
  assert 'compared' not in shown


def test_nothing_measured_is_an_error(works, checkout, capsys):
  words = [f'--var={checkout}', '--work=var-a/train']
  assert main(['bench', 'reference', *words]) == 1
  told = 'no work could be measured: var-a/train: RuntimeError: out of memory'
  assert told in capsys.readouterr().err


def test_torch_compile_is_beside_or_its_error():
  row = reference.figures(_pair(compiled=lambda: None), 1, 1)
  ratio = row['torch_compile_seconds'] / row['ours_seconds']
  assert row['torch_compile_ratio'] == pytest.approx(ratio)

  def no_compiler():
    raise OSError('no C++ compiler')

  row = reference.figures(_pair(compiled=no_compiler), 1, 1)
  assert row['torch_compile_error'] == 'OSError: no C++ compiler'
  assert row['ratio'] > 0


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
def test_what_cannot_be_measured_is_an_error(works, capsys, words, message):
  assert main(['bench', 'reference', *words]) == 1
  assert message in capsys.readouterr().err


def test_a_checkout_gives_its_own_modules(checkout):
  there = Checkout('var', str(checkout))
  assert there.load('standin.models').WIDTH == 3
  with pytest.raises(
    ValueError, match=r'standin.broken cannot be imported: Mo'
  ):
    there.load('standin.broken')
  with pytest.raises(ValueError, match=r'json was imported from .*, not from'):
    there.load('json')


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
def test_training_steps_of_both_sides_are_the_same(monkeypatch):
  torch = pytest.importorskip('torch')
  # Large steps, so that each setting of the optimiser shows in the next loss.
  optim = torch_side.OptimConfig(lr=0.5, weight_decay=0.3)
  monkeypatch.setattr(torch_side, 'OptimConfig', lambda: optim)
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
  batch = {'x': jnp.float32(x), 'y': jnp.float32(y)}
  model = torch_side.shaken(torch.nn.Linear(3, 2))
  given = [torch_side.to_torch(np.float32(v)) for v in (x, y)]

  def loss(model):
    return ((model(given[0]) - given[1]) ** 2).sum()

  def pair(setting):
    params = torch_side.on_device(torch_side.tensors(model))
    params = {'kernel': params['weight'], 'bias': params['bias']}
    return torch_side.training_pair(Line(), params, batch, model, loss, setting)

  start = loss(model).item()
  both = pair(Setting())
  difference, compared = both.differ()
  assert difference < 1e-4
  assert compared == 'loss of 3 steps'
  assert float(both.ours()) < start
  assert pair(Setting(dropout=True)).differ()[0] is None


@pytest.mark.slow
def test_the_reference_computes_in_the_type_of_the_setting():
  torch = pytest.importorskip('torch')
  model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
  for dtype in ('float32', 'bfloat16'):
    out = torch_side.in_dtype(model, Setting(dtype=dtype))(x)
    assert out.dtype == getattr(torch, dtype)
    assert torch_side.to_numpy(out.detach()).dtype == np.float32
  assert model(x).dtype == torch.float32
