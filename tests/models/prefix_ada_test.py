"""Scale order: set 0 under the null class, and one prefix for all branches."""

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


def _make(ada, **fields):
  config = scar_config(
    order__name='scale', prefix__ada=ada, text__kind='label', text__classes=5,
    **fields,
  )  # fmt: skip
  task = make_task(config, frozen_artifacts('scale'))
  batch = scar_batch(2) | {'label': jnp.array([3, 4])}
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  params = {'params': noisy(unbox(shapes['params']), scale=0.5)}
  cond, _ = jax.jit(task.parts.conditions)(task.frozen, batch)
  tokens = jax.jit(task.parts.tokens)(task.frozen, batch['target'])
  return task, params, cond, tokens


def _run(task, params, cond, tokens):
  add = task.parts.accumulate(task.frozen)
  return jax.jit(task.model.apply)(params, tokens, cond, accumulate=add)


@pytest.mark.parametrize('ada', ['class', 'null'])
def test_which_class_modulates_the_prefix(ada):
  task, params, cond, tokens = _make(ada)
  first = _run(task, params, cond, tokens)
  other = _run(task, params, cond.replace(label=cond.label - 2), tokens)
  gap = np.abs(first.hidden - other.hidden).max(axis=(0, 2))
  prefix = task.editor.model.prefix.length
  assert (gap[prefix:] > 1e-3).all()
  assert (gap[:prefix] == 0).all() if ada == 'null' else (gap > 1e-3).all()


def test_branches_share_one_prefix_and_nothing_else_changes():
  task, params, cond, tokens = _make('null')
  sampler = Sampler(task.model, SamplerConfig(guidance=2.0, ramp='sets'))
  out = sampler.run(
    params, cond, np.array([1, 2]), forced=tokens, trace=True,
    accumulate=task.parts.accumulate(task.frozen),
  )  # fmt: skip
  for branch, null in enumerate((False, True)):
    given = cond.replace(null_text=jnp.full(2, null))
    want = _run(task, params, given, tokens).logits
    np.testing.assert_allclose(out.raw[branch], want, **CLOSE)
  stacked = jax.tree.map(lambda t: jnp.concatenate([t, t]), cond)
  whole, shared = (
    task.model.apply(params, stacked, 16, n, method='prefill')[1]
    for n in (1, 2)
  )
  assert shared.k.shape == whole.k.shape
  np.testing.assert_allclose(shared.k, whole.k, **CLOSE)


def test_the_setting_needs_the_scale_order():
  with pytest.raises(ValueError, match=r"prefix_ada='null' with order='ras"):
    make_task(scar_config(prefix__ada='null'), frozen_artifacts())
