"""Programs that outlive a process; cheaper numbers."""

import jax
import numpy as np
import pytest
from scar_setup import finished_runs

from scar_jax import precision, programs
from scar_jax.artifacts import load_artifact
from scar_jax.editor import Editor
from scar_jax.models import unstacked


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return finished_runs(tmp_path_factory.mktemp('made') / 'runs') / 'scar_run'


@pytest.fixture(scope='module')
def plain(run):
  return Editor.load(run, buckets=(3,))


@pytest.fixture(scope='module')
def logits(plain):
  return _logits(plain)


def _picture(seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (8, 8, 3), np.uint8)


def test_a_kept_program_is_not_traced_again(run, tmp_path, monkeypatch):
  first = Editor.load(run, cache=tmp_path)
  [made] = first(_picture(), 'x', guidance=2.0, output='array')
  assert (first.programs.traced, first.programs.read) == (3, 0)
  [path] = tmp_path.glob('sample-*.jax')
  monkeypatch.setattr(programs, 'generate', None)  # cannot be traced
  second = Editor.load(run, cache=tmp_path)
  [again] = second(_picture(), 'x', guidance=2.0, output='array')
  assert (second.programs.traced, second.programs.read) == (0, 3)
  np.testing.assert_array_equal(made, again)
  monkeypatch.undo()
  path.write_bytes(b'broken')
  third = Editor.load(run, cache=tmp_path)
  [anew] = third(_picture(), 'x', guidance=2.0, output='array')
  assert (third.programs.traced, third.programs.read) == (1, 2)
  np.testing.assert_array_equal(made, anew)


def test_another_code_version_has_other_programs(run, tmp_path, monkeypatch):
  Editor.load(run, cache=tmp_path)(_picture(), 'x')
  monkeypatch.setattr(programs, '_here', lambda: ('another',))
  other = Editor.load(run, cache=tmp_path)
  other(_picture(), 'x')
  assert (other.programs.traced, other.programs.read) == (3, 0)


@pytest.mark.parametrize('device', ['cpu', 'tpu'])
def test_kernels_of_large_models_are_turned_on_cpus(
  device, run, plain, logits, monkeypatch
):
  old = load_artifact(run).params
  jax.tree.map(np.testing.assert_array_equal, plain._params, old)  # a small one
  monkeypatch.setattr(unstacked, '_LARGE', 0)
  monkeypatch.setattr(precision, 'platform', lambda: device)
  editor = Editor.load(run, dtype='')
  if device == 'tpu':
    jax.tree.map(np.testing.assert_array_equal, editor._params, old)
    return
  found, raw = editor._params['decoder'], old['decoder']
  assert set(found['head']) == {'kernel_turned', *raw['head']} - {'kernel'}
  raw = raw['layers']['attn']['qkv']['kernel']
  found = found['layers']['attn']['qkv']['kernel_turned']
  np.testing.assert_array_equal(found, np.moveaxis(raw, 1, -1))
  np.testing.assert_allclose(_logits(editor), logits, atol=1e-5)
  [made] = editor(_picture(), 'x', output='array')
  [want] = plain(_picture(), 'x', output='array')
  np.testing.assert_allclose(made.astype(int), want.astype(int), atol=1)


def test_int8_weights_are_near_and_a_quarter_of_the_size(run, plain, logits):
  small = Editor.load(run, weights='int8')
  cfg = plain.cfg.model
  kernels = precision._kernels(cfg)
  names = {'/'.join(k.path) for k in kernels}
  assert {'decoder/layers/attn/qkv', 'decoder/layers/ffn/w2'} < names
  for kernel in kernels:
    old, new = plain._params, small._params
    for name in kernel.path:
      old, new = old[name], new[name]
    assert 'kernel' not in new
    assert new['kernel_int8'].dtype == np.int8
    at = new['kernel_int8'].ndim - kernel.inputs  # inputs are last
    scale = new['kernel_scale'][(...,) + (None,) * kernel.inputs]
    back = np.moveaxis(
      np.asarray(new['kernel_int8'] * scale),
      range(at, at + kernel.inputs),
      range(at - kernel.outputs, at - kernel.outputs + kernel.inputs),
    )
    error = np.abs(back - old['kernel'])
    assert error.max() <= np.max(scale) / 2 + 1e-6
    assert error.max() > 0
  assert small(_picture(), 'x', output='array')[0].shape == (8, 8, 3)
  gap = np.abs(logits - _logits(small)).max()
  assert 0 < gap < 0.05 * np.abs(logits).max()


def _logits(editor):
  from scar_jax.models.conditions import empty_conditions
  from scar_jax.models.scar import Scar

  cfg = editor.cfg.model
  cond = empty_conditions(cfg, 1)
  tokens = np.arange(4, dtype=np.int32)[None]
  model = jax.jit(Scar(cfg).apply)
  return np.asarray(model({'params': editor._params}, tokens, cond).logits)


def test_bfloat16_products_are_near(run, logits):
  half = Editor.load(run, dtype='bfloat16')
  assert half.cfg.model.decoder.dtype == half.cfg.encoder_dtype == 'bfloat16'
  assert half._params['decoder']['head']['kernel'].dtype == 'bfloat16'
  assert half._params['decoder']['norm']['scale'].dtype == 'float32'
  gap = np.abs(logits - _logits(half)).max()
  assert 0 < gap < 0.05 * np.abs(logits).max()
  with pytest.raises(ValueError, match=r"dtype='fp16'; accepted: '', 'float"):
    Editor.load(run, dtype='fp16')
  with pytest.raises(ValueError, match=r"weights='int4'; accepted: '', 'int8'"):
    Editor.load(run, weights='int4')


def test_a_mesh_shares_a_batch(run, plain):
  from scar_jax.sharding import make_mesh

  mesh = make_mesh({'data': 2}, jax.devices()[:2])
  spread = Editor.load(run, batch=3, mesh=mesh)
  assert spread.buckets == (2, 4)
  pictures = [_picture(i) for i in range(3)]
  made = spread(pictures, 'x', seed=3, output='array')
  alone = plain(pictures, 'x', seed=3, output='array')
  for a, b in zip(made, alone, strict=True):
    np.testing.assert_allclose(a.astype(int), b.astype(int), atol=1)
  with pytest.raises(ValueError, match=r'buckets=\(3,\); accepted: multiples'):
    Editor.load(run, mesh=mesh, buckets=[3])
