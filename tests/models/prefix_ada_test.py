"""Scale order: set 0 under the null class, and one prefix for all branches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import CLOSE, noisy
from scar_setup import frozen_artifacts, scar_batch, scar_config

from scar_jax.filters import SamplerConfig
from scar_jax.sampling import Sampler
from scar_jax.sharding import unbox
from scar_jax.train.tasks import make_task


@functools.cache
def _make(ada):
  """Task, variables, conditions, tokens, and the compiled full pass."""
  config = scar_config(
    order__name='scale', prefix__ada=ada, text__kind='label', text__classes=5,
  )  # fmt: skip
  task = make_task(config, frozen_artifacts('scale'))
  batch = scar_batch(2) | {'label': jnp.array([3, 4])}
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  params = {'params': noisy(unbox(shapes['params']), scale=0.5)}
  cond, _ = jax.jit(task.parts.conditions)(task.frozen, batch)
  tokens = jax.jit(task.parts.tokens)(task.frozen, batch['target'])
  add = task.parts.accumulate(task.frozen)
  run = jax.jit(functools.partial(task.model.apply, accumulate=add))
  return task, params, cond, tokens, run


@pytest.mark.parametrize('ada', ['class', 'null'])
def test_which_class_modulates_the_prefix(ada):
  task, params, cond, tokens, run = _make(ada)
  first = run(params, tokens, cond)
  other = run(params, tokens, cond.replace(label=cond.label - 2))
  gap = np.abs(first.hidden - other.hidden).max(axis=(0, 2))
  prefix = task.editor.model.prefix.length
  assert (gap[prefix:] > 1e-3).all()
  assert (gap[:prefix] == 0).all() if ada == 'null' else (gap > 1e-3).all()


def test_branches_share_one_prefix_and_nothing_else_changes():
  task, params, cond, tokens, run = _make('null')
  sampler = Sampler(task.model, SamplerConfig(guidance=2.0, ramp='sets'))
  out = sampler.run(
    params, cond, np.array([1, 2]), forced=tokens, trace=True,
    accumulate=task.parts.accumulate(task.frozen),
  )  # fmt: skip
  for branch, null in enumerate((False, True)):
    given = cond.replace(null_text=jnp.full(2, null))
    want = run(params, tokens, given).logits
    np.testing.assert_allclose(out.raw[branch], want, **CLOSE)
  stacked = jax.tree.map(lambda t: jnp.concatenate([t, t]), cond)
  prefill = jax.jit(
    functools.partial(task.model.apply, method='prefill'), static_argnums=(2, 3)
  )
  whole, shared = (prefill(params, stacked, 16, n)[1] for n in (1, 2))
  assert shared.k.shape == whole.k.shape
  np.testing.assert_allclose(shared.k, whole.k, **CLOSE)


def test_the_setting_needs_the_scale_order():
  with pytest.raises(ValueError, match=r"prefix_ada='null' with order='ras"):
    make_task(scar_config(prefix__ada='null'), frozen_artifacts())
