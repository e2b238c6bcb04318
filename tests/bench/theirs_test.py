"""The references' side: a process of its own that never loads JAX."""

import importlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from scar_jax.bench import reference
from scar_jax.bench.theirs.common import (
  Checkout,
  Setting,
  forward,
  in_dtype,
  to_numpy,
  trainer,
)
from scar_jax.bench.theirs.process import started

WORKS = """
import os
import signal
import sys

import numpy as np
from scar_jax.bench.theirs.common import Made

MODULES = ('standin.models',)

def made(checkout, size, setting):
  print('a constructor that prints', flush=True)
  calls = []

  def call():
    calls.append(size)
    if size == 'dies':
      os.kill(os.getpid(), signal.SIGKILL)
    if size == 'fails':
      raise KeyError('lost')
    return sum(range(200_000))

  def outputs():
    jax = any(name.split('.')[0] == 'jax' for name in sys.modules)
    return {'calls': np.array(len(calls)), 'jax': np.array(jax)}

  compiled = call if setting.compile else None
  weights = {'net': {'w': np.arange(3)}}
  return Made(weights, {'x': np.ones(2)}, call, outputs, compiled)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A checkout, and works beside it that a process finds."""
  (tmp_path / 'standin').mkdir()
  (tmp_path / 'standin/models.py').write_text('WIDTH = 3\n')
  (tmp_path / 'standin/broken.py').write_text('import no_such_package\n')
  (tmp_path / 'works.py').write_text(WORKS)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=os.pathsep)
  return Checkout('var', str(tmp_path))


@pytest.fixture
def theirs(checkout):
  """A process of the references."""
  with started() as process:
    yield process


def test_a_work_is_made_and_timed_over_there(theirs, checkout):
  theirs.load('works', checkout)
  given = theirs.make('works', 'made', checkout, '12', Setting())
  np.testing.assert_array_equal(given.weights['net']['w'], [0, 1, 2])
  np.testing.assert_array_equal(given.inputs['x'], [1, 1])
  assert not given.compiles
  for seconds in (theirs.timed(), theirs.timed()):
    assert min(seconds) > 0
  assert theirs.outputs() == {'calls': 2, 'jax': False}
  again = theirs.make('works', 'made', checkout, '12', Setting(compile=True))
  assert again.compiles
  assert theirs.timed('compiled')[0] > 0


def test_what_a_reference_prints_is_left_out(checkout, capfd):
  with started() as theirs:
    theirs.make('works', 'made', checkout, '12', Setting())
  assert capfd.readouterr().out == ''


def test_what_fails_over_there_is_told_here(theirs, checkout):
  theirs.make('works', 'made', checkout, 'fails', Setting())
  with pytest.raises(RuntimeError, match="in PyTorch: KeyError: 'lost'"):
    theirs.timed()
  # It goes on.
  assert theirs.outputs()['calls'] == 1
  with pytest.raises(ValueError, match=r'var=.nowhere.: no such directory; ac'):
    theirs.load('works', Checkout('var', 'nowhere'))
  theirs.make('works', 'made', checkout, 'dies', Setting())
  with pytest.raises(RuntimeError, match='PyTorch ended with exit code -9'):
    theirs.timed()


def test_the_process_ends_with_its_parent(theirs):
  assert theirs._process.poll() is None
  with started() as other:
    process = other._process
  assert process.poll() == 0
  theirs._process.send_signal(signal.SIGKILL)
  theirs._process.wait()
  with pytest.raises(RuntimeError, match='ended with exit code -9'):
    theirs.outputs()


def test_a_checkout_gives_its_own_modules(checkout, monkeypatch):
  monkeypatch.setattr(sys, 'path', list(sys.path))
  assert checkout.load('standin.models').WIDTH == 3
  with pytest.raises(
    ValueError, match=r'standin.broken cannot be imported: Mo'
  ):
    checkout.load('standin.broken')
  with pytest.raises(ValueError, match=r'json was imported from .*, not from'):
    checkout.load('json')
  for name in [n for n in sys.modules if n.split('.')[0] == 'standin']:
    del sys.modules[name]


def test_no_module_of_theirs_loads_jax():
  names = sorted({work.theirs for work in reference.WORKS.values()})
  assert len(names) == 3
  code = f'import sys, {", ".join(names)}; print("jax" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout == 'False\n'


def test_every_work_has_both_sides():
  for work in reference.WORKS.values():
    for side in ('ours', 'theirs'):
      name = f'scar_jax.bench.{side}.{work.checkout}'
      made = getattr(importlib.import_module(name), work.make)
      assert callable(made), (name, work)


@pytest.mark.slow
def test_modules_and_calls_are_compiled_if_asked(monkeypatch):
  torch = pytest.importorskip('torch')
  seen = []
  # The length of a module is not its truth.
  monkeypatch.setattr(
    torch, 'compile', lambda x: seen.append(x) or Lengthless()
  )

  class Lengthless(torch.nn.Linear):
    def __init__(self):
      super().__init__(3, 2)

    def __len__(self):
      raise TypeError('no len()')

  model, x = Lengthless(), torch.ones(4, 3)
  for compile in (False, True):
    setting = Setting(compile=compile)
    parts = forward(model, (x,), setting)
    steps = trainer(model, lambda m: m(x).sum(), setting)
    assert seen == [model, model] * compile
    for program in (parts['compiled'], steps['compiled']):
      assert (program is not None) == compile
      if compile:
        program()
    assert parts['call']().shape == (4, 2)
    assert steps['call']().requires_grad is False


@pytest.mark.slow
def test_the_reference_computes_in_the_type_of_the_setting():
  torch = pytest.importorskip('torch')
  model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
  for dtype in ('float32', 'bfloat16'):
    out = in_dtype(model, Setting(dtype=dtype))(x)
    assert out.dtype == getattr(torch, dtype)
    assert to_numpy(out).dtype == np.float32
  assert to_numpy(torch.arange(3)).dtype == np.int64
  assert model(x).dtype == torch.float32
