"""Sampling in the scale order: one program, mixtures, the default ramp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy
from scar_setup import frozen_artifacts, scar_batch, scar_config

from scar_jax import config as config_lib
from scar_jax.filters import SamplerConfig, mixture, ramp_weights
from scar_jax.models import stack
from scar_jax.models.conditions import Conditions
from scar_jax.parts import sampler_config
from scar_jax.sampling import Sampler
from scar_jax.sampling_loop import sample_keys
from scar_jax.sharding import unbox
from scar_jax.train.tasks import make_task

SEEDS = np.array([3, 4, 5])


def _make(**fields):
  """Task, parameters and conditions of three samples."""
  artifacts = frozen_artifacts('scale')
  task = make_task(scar_config(order__name='scale', **fields), artifacts)
  batch = scar_batch(3)
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  params = {'params': noisy(unbox(shapes['params']), scale=0.5)}
  cond, _ = jax.jit(task.parts.conditions)(task.frozen, batch)
  return task, params, cond


@pytest.fixture(scope='module')
def tiny():
  return _make()


def test_a_program_serves_every_tokenizer_and_strength(tiny):
  task, params, cond = tiny
  sampler = Sampler(task.model, SamplerConfig(guidance=2.0, ramp='sets'))
  other = {'tokenizer': noisy(task.frozen['tokenizer'], seed=9)}

  def run(frozen, guidance=2.0):
    add = task.parts.accumulate(frozen)
    return sampler.run(
      params, cond, SEEDS, guidance, accumulate=add, trace=True
    )

  first, second = run(task.frozen), run(other)
  np.testing.assert_array_equal(first.raw[:, :, 0], second.raw[:, :, 0])
  assert np.abs(first.raw[:, :, 1:] - second.raw[:, :, 1:]).max() > 1e-3
  run(task.frozen, 4.0)
  assert sampler.compilations == 1
  with pytest.raises(ValueError, match='got accumulate=None'):
    sampler.run(params, cond, SEEDS)


def test_the_latent_is_that_of_the_tokens(tiny):
  task, params, cond = tiny
  sampler = Sampler(task.model, SamplerConfig(guidance=2.0, top_k=4))
  add = task.parts.accumulate(task.frozen)
  out = sampler.run(params, cond, SEEDS, accumulate=add)
  assert out.tokens.shape == (3, 5)
  images = jax.jit(task.parts.images)
  by_latent = images(task.frozen, out.tokens, out.latent)
  by_tokens = images(task.frozen, out.tokens)
  np.testing.assert_allclose(by_latent, by_tokens, atol=1e-5)
  # A sample depends on its seed alone.
  turned = jax.tree.map(lambda x: x[::-1], cond)
  again = sampler(params, turned, SEEDS[::-1], accumulate=add)
  np.testing.assert_array_equal(again[::-1], out.tokens)


def test_top_k_holds_in_every_scale(tiny):
  task, params, cond = tiny
  add = task.parts.accumulate(task.frozen)
  sampler = Sampler(
    task.model, SamplerConfig(guidance_mode='none', guidance=1.0, top_k=2)
  )
  for seed in range(4):
    out = sampler.run(params, cond, SEEDS + seed, accumulate=add, trace=True)
    rank = np.argsort(-np.asarray(out.guided), axis=-1)[..., :2]
    assert np.all(np.any(rank == np.asarray(out.tokens)[..., None], axis=-1))


def test_a_mixture_is_the_gumbel_softmax_of_the_reference():
  logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
  keys = sample_keys(jnp.array([1, 2]), 5)
  noise = jnp.stack([jax.random.gumbel(k, (3, 7)) for k in keys])
  cfg = SamplerConfig(smooth=True)
  for progress, softness in ((0.0, 0.27), (0.5, 0.27 * 0.525), (1.0, 0.0135)):
    want = jax.nn.softmax((logits * (1 + progress) + noise) / softness)
    got = mixture(logits, keys, cfg, progress)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  kept = mixture(logits, keys, SamplerConfig(smooth=True, top_k=2), 0.0)
  assert ((kept > 0).sum(-1) <= 2).all()


def test_a_mixture_goes_into_the_latent_and_its_code_into_the_tokens(tiny):
  task, params, cond = tiny
  add = task.parts.accumulate(task.frozen)
  soft = Sampler(task.model, SamplerConfig(guidance=2.0, smooth=True))
  out = soft.run(params, cond, SEEDS, accumulate=add)
  hard, _ = jax.jit(
    lambda params, tokens: task.parts.tokenizer.apply(
      {'params': params}, tokens, method='tokens_to_latent'
    )
  )(task.frozen['tokenizer'], out.tokens)
  assert out.latent.shape == hard.shape
  assert np.abs(out.latent - hard).max() > 1e-3
  # With one code left to choose from, there is nothing to mix.
  one = Sampler(task.model, SamplerConfig(guidance=2.0, smooth=True, top_k=1))
  plain = Sampler(task.model, SamplerConfig(guidance=2.0, top_k=1))
  mixed = one.run(params, cond, SEEDS, accumulate=add)
  drawn = plain.run(params, cond, SEEDS, accumulate=add)
  np.testing.assert_array_equal(mixed.tokens, drawn.tokens)
  np.testing.assert_allclose(mixed.latent, drawn.latent, atol=1e-5)


def test_mixtures_are_refused_where_they_mean_nothing():
  with pytest.raises(
    ValueError, match=r'sample\.smooth=True; accepted: True w'
  ):
    SamplerConfig(smooth=True, temperature=0.0)
  raster = make_task(scar_config(), frozen_artifacts())
  sampler = Sampler(raster.model, SamplerConfig(smooth=True))
  with pytest.raises(ValueError, match=r"smooth=True with order 'raster', whi"):
    sampler.run({}, Conditions(), SEEDS)


def test_guidance_ramps_by_default_in_the_scale_order_only():
  section = config_lib.SampleConfig(guidance=2.5)
  assert sampler_config(section, 'scale').ramp == 'sets'
  assert sampler_config(section, 'raster').ramp == 'constant'
  section = config_lib.SampleConfig(ramp='constant')
  assert sampler_config(section, 'scale').ramp == 'constant'
  # VAR: t = cfg s / (S - 1), and a strength of 1 + t.
  cfg = SamplerConfig(guidance=2.5, ramp='sets')
  weights = ramp_weights((1, 4, 9, 16), cfg)
  np.testing.assert_allclose(weights, [0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
  ('places', 'many'),
  [('normal', 0), ('sincos', 2**18), ('rotary', 2**18), ('rotary', 0)],
)
def test_cached_logits_are_those_of_training(places, many, monkeypatch):
  # Layers write the cache, or from `many` values on all read it first.
  monkeypatch.setattr(stack, '_MANY', many)
  task, params, cond = _make(model__places=places, prefix__rope='aligned')
  add = task.parts.accumulate(task.frozen)
  sampler = Sampler(task.model, SamplerConfig(guidance=1.0))
  out = sampler.run(params, cond, SEEDS, accumulate=add, trace=True)
  apply = jax.jit(lambda p, t: task.model.apply(p, t, cond, accumulate=add))
  full = apply(params, out.tokens).logits
  np.testing.assert_allclose(out.raw[0], full, rtol=1e-4, atol=1e-4)
