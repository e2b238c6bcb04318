"""The train step: updates, skipped steps, accumulation, master weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import ToyConfig, ToyLoader, ToyTask

from scar_jax.config import OptimConfig
from scar_jax.sharding import make_mesh
from scar_jax.train import state as state_lib
from scar_jax.train import step as step_lib
from scar_jax.train.optim import make_optimizer
from scar_jax.train.step import make_step
from scar_jax.train.tasks import abstract


def _setup(task, batch, accum=1, ema=0.9, **optim):
  cfg = OptimConfig(**{'lr': 1e-2, **optim})
  boxed = state_lib.abstract_variables(task, abstract(batch))
  tx = make_optimizer(cfg, 10, boxed['params'])
  init = state_lib.make_init(task, tx, abstract(batch), ema > 0)
  step = make_step(task, tx, cfg, 10, accum, ema)
  return init(jnp.uint32(0)), jax.jit(step), boxed, init


def _bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_step_learns_and_counts():
  batch = next(ToyLoader())
  task = ToyTask()
  state, step, *_ = _setup(task, batch)
  first = None
  for _ in range(5):
    state, metrics = step(state, task.frozen, batch)
    first = first or float(metrics['loss'])
  assert float(metrics['loss']) < first
  assert int(state.step) == 5
  assert int(state.skipped) == 0
  assert float(state.extra['usage']['rows']) == 40
  assert float(metrics['lr']) == pytest.approx(1e-2)


def test_the_norm_of_all_gradients_is_computed_once(monkeypatch):
  norm, calls = optax.tree.norm, []
  monkeypatch.setattr(
    optax.tree, 'norm', lambda tree: calls.append(tree) or norm(tree)
  )
  batch = next(ToyLoader())
  state, step, *_ = _setup(ToyTask(), batch, clip=1.0)
  step.trace(state, ToyTask().frozen, batch)
  assert len(calls) == 1


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_nan_pixel_changes_nothing_but_counters(case, platform, monkeypatch):
  monkeypatch.setattr(step_lib, 'platform', lambda: platform)
  data = dict(np.load(case('c25_nan_batch.npz')))
  images = next(v for v in data.values() if v.dtype.kind == 'f')
  image = images.reshape(images.shape[0], -1)[:, :48].reshape(-1, 4, 4, 3)
  image = np.concatenate([image, image])[:4].astype(np.float32)
  image[2, 0, 0, 0] = np.nan
  good = next(ToyLoader(batch=4))
  bad = {**good, 'target': image}
  task = ToyTask()
  state, step, *_ = _setup(task, good)
  state, _ = step(state, task.frozen, good)
  for row in (1, 2):
    after, metrics = step(state, task.frozen, bad)
    kept = ('params', 'opt_state', 'ema', 'extra')
    for name in kept:
      assert _bits(getattr(after, name)) == _bits(getattr(state, name))
    assert int(after.skipped) == row
    assert float(metrics['bad_in_row']) == row
    state = after
  state, metrics = step(state, task.frozen, good)
  assert int(state.skipped) == 2
  assert int(state.bad_in_row) == 0
  assert int(state.step) == 4


class _RootTask:
  """Finite loss whose gradient is not (case C25)."""

  name, frozen = 'root', {}

  def __init__(self, x):
    self.x = jnp.asarray(x, jnp.float32)

  def init(self, rng, batch):
    return {'params': {'x': self.x}}

  def loss(self, params, extra, frozen, batch, rng, train):
    return jnp.sum(0 * jnp.sqrt(params['x'])), ({}, extra)


def test_finite_loss_with_nan_gradient_is_caught(case):
  spec = json.loads(case('c25_steps.json').read_text())
  spec = spec['finite_loss_nan_grad']
  batch = next(ToyLoader())
  task = _RootTask(spec['x'])
  state, step, *_ = _setup(task, batch)
  after, metrics = step(state, {}, batch)
  assert float(metrics['loss']) == 0.0
  assert np.isnan(metrics['grad_norm'])
  assert int(after.skipped) == 1
  np.testing.assert_array_equal(after.params['x'], spec['x'])


class _LinearTask:
  """Gradient 1 whatever the parameter."""

  name, frozen = 'linear', {}

  def __init__(self, start, dtype=jnp.float32):
    self.start, self.dtype = start, dtype

  def init(self, rng, batch):
    return {'params': {'x': jnp.asarray(self.start, self.dtype)}}

  def loss(self, params, extra, frozen, batch, rng, train):
    # Compute in bfloat16 as a model would.
    return params['x'].astype(jnp.bfloat16).astype(jnp.float32), ({}, extra)


def test_the_update_is_in_place():
  batch = next(ToyLoader())
  task = ToyTask(ToyConfig(width=512))
  state, _, boxed, _ = _setup(task, batch)
  tx = make_optimizer(OptimConfig(), 10, boxed['params'])
  step = make_step(task, tx, OptimConfig(), 10, 1, 0.9)
  program = jax.jit(step, donate_argnums=0).lower(state, task.frozen, batch)
  memory = program.compile().memory_analysis()
  params = sum(x.nbytes for x in jax.tree.leaves(state.params))
  assert memory.alias_size_in_bytes >= 4 * params  # with moments and EMA
  assert memory.temp_size_in_bytes < 2 * params  # gradients, activations


def test_small_updates_and_ema_are_not_lost(case):
  spec = json.loads(case('c25_steps.json').read_text())
  lost, ema = spec['lost_update'], spec['ema_lost_update']
  batch = next(ToyLoader())
  task = _LinearTask(lost['param'])
  state, *_ = _setup(task, batch, ema=ema['decay'])
  tx = optax.sgd(lost['lr'])
  step = make_step(task, tx, OptimConfig(), 1000, 1, ema['decay'])
  state = state.replace(
    opt_state=tx.init(state.params), ema={'x': jnp.float32(ema['ema'])}
  )
  run = jax.jit(
    lambda s, n: jax.lax.fori_loop(0, n, lambda _, s: step(s, {}, batch)[0], s)
  )
  after = run(state, ema['steps'])
  assert float(after.ema['x']) == pytest.approx(0.505, abs=1e-4)
  after = run(state, lost['steps'])
  assert float(after.params['x']) == pytest.approx(0.99, abs=1e-4)


def test_narrow_master_weights_are_refused():
  task = _LinearTask(1.0, jnp.bfloat16)
  with pytest.raises(ValueError, match='parameter x is bfloat16; master'):
    state_lib.abstract_variables(task, abstract(next(ToyLoader())))


def test_accumulation_equals_one_batch():
  batch = next(ToyLoader())
  task = ToyTask(ToyConfig(dropout=0.0))
  one, step_one, *_ = _setup(task, batch)
  two, step_two, *_ = _setup(task, batch, accum=2)
  one, m1 = step_one(one, task.frozen, batch)
  two, m2 = step_two(two, task.frozen, batch)
  assert float(m1['loss']) == pytest.approx(float(m2['loss']), rel=1e-6)
  assert float(m1['grad_norm']) == pytest.approx(
    float(m2['grad_norm']), rel=1e-5
  )
  # Adam's first update is the sign of the gradient: compare moments instead.
  for a, b in zip(
    jax.tree.leaves(one.opt_state), jax.tree.leaves(two.opt_state), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)
  assert float(two.extra['usage']['rows']) == 8


class _HookTask(ToyTask):
  def post_update(self, params, extra, rng, step):
    params = jax.tree.map(jnp.zeros_like, params)
    return params, {'usage': {'rows': jnp.float32(-1)}}


def test_post_update_runs_after_the_optimizer():
  batch = next(ToyLoader())
  task = _HookTask()
  state, step, *_ = _setup(task, batch, ema=0.5)
  before = state.params['up']['kernel']
  state, _ = step(state, task.frozen, batch)
  assert all(not np.any(x) for x in jax.tree.leaves(state.params))
  np.testing.assert_allclose(state.ema['up']['kernel'], before * 0.5)
  assert float(state.extra['usage']['rows']) == -1


@pytest.mark.parametrize(
  'sizes', [{'data': 8}, {'fsdp': 8}, {'tensor': 2, 'fsdp': 4}]
)
def test_state_is_born_sharded_and_loss_equal(sizes):
  batch = next(ToyLoader())
  task = ToyTask()
  plain, step, boxed, init = _setup(task, batch)
  want = step(plain, task.frozen, batch)[1]['loss']
  mesh = make_mesh({'data': 1, **sizes})
  with jax.set_mesh(mesh):
    shapes = state_lib.abstract_state(init)
    places = state_lib.state_shardings(shapes, boxed, mesh)
    state = state_lib.create(init, places, 0)
    kernel = state.params['up']['kernel']
    split = sizes.get('fsdp', 1) * sizes.get('tensor', 1)
    assert kernel.addressable_shards[0].data.size == kernel.size // split
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 2]
    assert len(moments) == 4
    for moment in moments:
      assert moment.addressable_shards[0].data.size == moment.size // split
    _, metrics = step(state, task.frozen, batch)
  np.testing.assert_allclose(metrics['loss'], want, rtol=1e-5)


def test_compiler_options_are_for_tpus(monkeypatch):
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  given = {}

  class Lowered:
    def compile(self, options):
      given.update(options)
      return lowered.compile()

  options = (('xla_a', 'true'), ('xla_b', '17408'), ('xla_c', 'word'))
  step_lib.compile_with(Lowered(), options, {'effort': -1.0})
  assert given == {'effort': -1.0}
  monkeypatch.setattr(step_lib, 'platform', lambda: 'tpu')
  assert step_lib.compile_with(Lowered(), options)(1.0) == 2
  assert given == {
    'effort': -1.0, 'xla_a': 'true', 'xla_b': '17408', 'xla_c': 'word',
  }  # fmt: skip
  with pytest.raises(ValueError, match=r"tpu_options=.*No such.*'xla_none'"):
    step_lib.compile_with(lowered, (('xla_none', 'true'),))
