"""Pictures decoded from the mean of the likely codes, not from those drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy
from scar_setup import frozen_artifacts, scar_batch, scar_config

from scar_jax.filters import SamplerConfig
from scar_jax.models.conditions import Conditions
from scar_jax.orders.random import Known
from scar_jax.sampling import Sampler
from scar_jax.sharding import unbox
from scar_jax.train.tasks import make_task

SEEDS = np.array([3, 4, 5])


@functools.cache
def _tiny(order):
  """Task, parameters and conditions of three samples, and the codes."""
  config = scar_config(order__name=order, order__num_sets=3)
  task = make_task(config, frozen_artifacts())
  batch = scar_batch(3)
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  params = {'params': noisy(unbox(shapes['params']), scale=0.5)}
  cond, _ = jax.jit(task.parts.conditions)(task.frozen, batch)
  return task, params, cond, np.asarray(task.parts.codes(task.frozen))


def _run(order, known=None, trace=True, **settings):
  task, params, cond, _ = _tiny(order)
  sampler = Sampler(task.model, SamplerConfig(guidance=2.0, **settings))
  add = task.parts.accumulate(task.frozen)
  return sampler.run(
    params, cond, SEEDS, accumulate=add, known=known, trace=trace
  )


def _flat(out):
  return np.asarray(out.latent).reshape(*out.tokens.shape, -1)


@pytest.mark.parametrize('temperature', [0.0, 0.7])
def test_the_latent_is_the_mean_under_the_guided_distribution(temperature):
  settings = dict(temperature=temperature, top_k=5)
  out = _run('raster', mean_code=True, **settings)
  heated = np.asarray(out.guided) / (temperature or 1.0)
  least = np.sort(heated, axis=-1)[..., -5, None]
  share = np.where(heated >= least, np.exp(heated - heated.max()), 0)
  share /= share.sum(-1, keepdims=True)
  np.testing.assert_allclose(_flat(out), share @ _tiny('raster')[3], atol=1e-5)
  plain = _run('raster', trace=False, **settings)
  np.testing.assert_array_equal(out.tokens, plain.tokens)
  assert plain.latent is None


@pytest.mark.parametrize('schedule', ['random', 'confidence'])
def test_with_one_code_to_choose_from_it_is_that_of_the_token(schedule):
  more = dict(schedule=schedule) if schedule != 'random' else {}
  out = _run('random', mean_code=True, top_k=1, **more)
  np.testing.assert_allclose(
    _flat(out), _tiny('random')[3][out.tokens], atol=1e-6
  )
  task = _tiny('random')[0]
  images = jax.jit(task.parts.images)
  np.testing.assert_allclose(
    images(task.frozen, out.tokens, out.latent),
    images(task.frozen, out.tokens),
    atol=1e-5,
  )


def test_what_is_known_keeps_its_codes():
  task, _, _, codes = _tiny('random')
  count, rng = task.tokens, np.random.default_rng(0)
  keep = np.stack([rng.permutation(count) < count // 2 for _ in range(3)])
  tokens = rng.integers(0, len(codes), (3, count)).astype(np.int32)
  known = Known(jnp.asarray(tokens), jnp.asarray(keep), count // 4)
  out = _run('random', known, mean_code=True, temperature=3.0)
  found, hard = _flat(out), codes[out.tokens]
  np.testing.assert_array_equal(np.asarray(out.tokens)[keep], tokens[keep])
  np.testing.assert_allclose(found[keep], hard[keep], atol=1e-6)
  assert np.abs(found - hard).max(-1)[~keep].min() > 1e-4


def test_the_scale_order_has_mixtures_of_its_own():
  task = make_task(scar_config(order__name='scale'), frozen_artifacts('scale'))
  sampler = Sampler(task.model, SamplerConfig(mean_code=True))
  with pytest.raises(ValueError, match="mean_code=True with order 'scale'"):
    sampler.run({}, Conditions(), SEEDS)


def test_codes_are_needed():
  task, params, cond, _ = _tiny('raster')
  sampler = Sampler(task.model, SamplerConfig(mean_code=True))
  with pytest.raises(ValueError, match='mean_code=True with accumulate=None'):
    sampler.run(params, cond, SEEDS)
