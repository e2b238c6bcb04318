"""Targets that grow, and samples that share a condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy, tiny_config, tiny_model
from scar_setup import frozen_artifacts, scar_batch, scar_config

from scar_jax.filters import SamplerConfig
from scar_jax.sampling import Sampler, generate
from scar_jax.sampling_steps import pieces, sampling_order, split_scales
from scar_jax.sharding import unbox
from scar_jax.train.tasks import make_task

SEEDS = np.array([4, 5, 6])
# Targets done after each piece.
GROWTH = {'raster': [3, 6], 'random': [1, 3, 6], 'scale': [1, 5]}


def _case(order):
  """Model, variables, conditions of three samples, and `accumulate`."""
  if order != 'scale':
    sets = {'order': 'random', 'num_sets': 3} if order == 'random' else {}
    return *tiny_model(tiny_config(**sets)), None
  task = make_task(scar_config(order__name='scale'), frozen_artifacts('scale'))
  batch = scar_batch(3)
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  params = {'params': noisy(unbox(shapes['params']), scale=0.5)}
  cond, _ = jax.jit(task.parts.conditions)(task.frozen, batch)
  return task.model, params, cond, task.parts.accumulate(task.frozen)


@pytest.mark.parametrize('order', list(GROWTH))
def test_what_grows_ends_as_what_is_made_at_once(order):
  model, variables, cond, add = _case(order)
  settings = SamplerConfig(guidance=2.0, top_k=8)
  sampler = Sampler(model, settings)
  whole = sampler.run(variables, cond, SEEDS, accumulate=add)
  grown = list(sampler.stream(variables, cond, SEEDS, accumulate=add))
  np.testing.assert_array_equal(grown[-1].tokens, whole.tokens)
  assert [int(g.done[0].sum()) for g in grown] == GROWTH[order]
  for out in grown:  # what is drawn stays
    same = np.asarray(out.tokens == whole.tokens)
    assert same[np.asarray(out.done)].all()
  if order == 'scale':
    np.testing.assert_allclose(grown[-1].latent, whole.latent, atol=1e-5)
  if order != 'raster':
    return
  scales, static = split_scales(settings)
  copied = jax.jit(
    lambda *given: generate(
      model, *given, scales, static, accumulate=add, copies=2
    )
  )(
    variables,
    jax.tree.map(lambda x: x[:2], cond),
    jnp.asarray([4, 9, 8, 5], jnp.uint32),
  )
  np.testing.assert_array_equal(copied.tokens[0], whole.tokens[0])
  np.testing.assert_array_equal(copied.tokens[3], whole.tokens[1])
  assert (copied.tokens[1] != whole.tokens[0]).any()


def test_a_prefix_that_sees_no_text_is_computed_once():
  model, variables, cond = tiny_model(tiny_config(prefix_mask='causal'))
  assert model.cfg.shared_len == model.cfg.prefix.length > 0
  both = jax.tree.map(lambda x: jnp.concatenate([x, x]), cond)
  both = both.replace(null_text=jnp.repeat(jnp.array([False, True]), 3))
  whole, shared = (
    jax.jit(lambda v, c, n=n: model.apply(v, c, 16, n, method='prefill'))(
      variables, both
    )
    for n in (1, 2)
  )
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(shared), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert tiny_config().shared_len == 0  # the paper's mask


def test_long_runs_are_cut_at_rows():
  cfg = tiny_config(grid=(4, 5))
  order = sampling_order(cfg, SamplerConfig())
  found = pieces(order, SamplerConfig(), grow=True)
  assert [(p.first, p.last) for p in found] == [
    (1, 5), (5, 10), (10, 15), (15, 20),
  ]  # fmt: skip
  assert [p.opens for p in found] == [True, False, False, False]
  assert [p[1:] for p in pieces(order, SamplerConfig())] == [(1, 20)]
