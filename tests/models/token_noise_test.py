"""Noise on the inputs of training: what it touches and how much of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy, tiny_config

from scar_jax.models.conditions import empty_conditions
from scar_jax.models.scar import Scar


@pytest.fixture(scope='module')
def tiny():
  """A model without dropout of any other kind, its weights and inputs."""
  cfg = tiny_config(
    token_noise=1.0, text_dropout=0.0, prefix_dropout=0.0, token_dropout=0.0
  )
  decoder = dataclasses.replace(
    cfg.decoder, resid_dropout=0.0, ffn_dropout=0.0, vocab=97
  )
  cfg = dataclasses.replace(cfg, decoder=decoder)
  tokens = jnp.arange(2 * 6).reshape(2, 6)
  cond = empty_conditions(cfg, 2)
  shapes = jax.eval_shape(Scar(cfg).init, jax.random.key(0), tokens, cond)
  return cfg, noisy(shapes['params']), tokens, cond


@functools.cache
def _apply(cfg):
  return jax.jit(Scar(cfg).apply, static_argnames=('deterministic', 'method'))


def _run(tiny, noise, deterministic=False, seed=0):
  cfg, params, tokens, cond = tiny
  run = _apply(dataclasses.replace(cfg, token_noise=noise))
  streams = 'dropout', 'condition'
  rngs = dict(zip(streams, jax.random.split(jax.random.key(seed)), strict=True))
  return run(
    {'params': params}, tokens, cond, deterministic=deterministic, rngs=rngs
  )


def test_targets_stay_and_the_first_logits_have_seen_no_token(tiny):
  clean, noised = _run(tiny, 0.0, seed=2), _run(tiny, 1.0, seed=2)
  np.testing.assert_array_equal(noised.targets, clean.targets)
  np.testing.assert_allclose(noised.logits[:, 0], clean.logits[:, 0], 1e-5)
  assert np.abs(noised.logits[:, -1] - clean.logits[:, -1]).max() > 1e-2


def test_no_noise_outside_training(tiny):
  clean = _run(tiny, 0.0, deterministic=True)
  noised = _run(tiny, 1.0, deterministic=True)
  np.testing.assert_array_equal(noised.logits, clean.logits)


# No token is that of the sample before at the same place.
TOKENS = (jnp.arange(970) + jnp.arange(2000)[:, None]) % 97


def _noised(tiny, **changes):
  cfg, params, *_ = tiny
  run = _apply(dataclasses.replace(cfg, **changes))
  rngs = {'dropout': jax.random.key(1)}
  return run({'params': params}, TOKENS, method='_noisy', rngs=rngs)


@pytest.mark.parametrize('most', [0.3, 1.0])
def test_each_sample_has_a_share_of_its_own_up_to_the_most(tiny, most):
  noised = np.asarray(_noised(tiny, token_noise=most))
  hit = noised != TOKENS
  np.testing.assert_array_equal(noised[hit], np.roll(TOKENS, 1, axis=0)[hit])
  share = hit.mean(1)
  assert share.max() < most + 0.1
  assert share.mean() == pytest.approx(most / 2, rel=0.05)
  assert share.std() == pytest.approx(most / 12**0.5, rel=0.1)


@pytest.mark.parametrize('noise', [0.0, 0.5])
def test_some_samples_lose_all_inputs(tiny, noise):
  noised = _noised(tiny, token_noise=noise, context_dropout=0.25)
  share = np.mean(np.asarray(noised != TOKENS), axis=1)
  lost = share > 0.9
  assert lost.mean() == pytest.approx(0.25, abs=0.03)
  assert share[~lost].max() <= noise + 0.1


def test_a_single_sample_takes_codes_of_its_own(tiny):
  cfg, params, *_ = tiny
  run = _apply(dataclasses.replace(cfg, token_noise=1.0, context_dropout=1.0))
  rngs = {'dropout': jax.random.key(1)}
  one = TOKENS[:1]
  noised = run({'params': params}, one, method='_noisy', rngs=rngs)
  np.testing.assert_array_equal(noised, np.roll(one, 970 // 2, axis=1))
