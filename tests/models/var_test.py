"""VAR as a `Scar` in the scale order: branches of guidance, and invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import CLOSE, noisy

from scar_jax.convert import var, var_vqvae
from scar_jax.filters import SamplerConfig
from scar_jax.models.blocks import by_position
from scar_jax.models.conditions import Conditions, empty_conditions
from scar_jax.models.decoder import DecoderConfig
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.tokenizers.msvq import accumulator
from scar_jax.sampling import generate
from scar_jax.sharding import unbox


@pytest.fixture(scope='module')
def tokenizer(golden):
  state, _ = golden('var_vqvae')
  cfg = var_vqvae.detect(state, (1, 2, 3, 4))
  return cfg, var_vqvae.convert(cfg, state)


@pytest.mark.parametrize('count', [1, 3])
def test_one_sample_is_modulated_like_many(count):
  """Of one, the gradient is a sum over both axes: see `by_position`."""
  vectors = jax.random.normal(jax.random.key(0), (count, 6))
  x = jax.random.normal(jax.random.key(1), (count, 5, 6))

  def loss(vectors):
    return jnp.sum(jnp.sin(x * by_position(vectors, None, 5)))

  plain = jax.grad(lambda v: jnp.sum(jnp.sin(x * v[:, None])))(vectors)
  np.testing.assert_allclose(jax.grad(loss)(vectors), plain, atol=1e-5)
  text = str(jax.make_jaxpr(jax.grad(loss))(vectors))
  assert ('reduce_sum[axes=(1,)' in text) == (count > 1)


def test_logits_of_both_branches_match_the_reference(tokenizer, golden):
  """Greedy; the guided ones are among the outputs of the self-test."""
  state, a = golden('var')
  cfg = var.detect(state, heads=4).model

  @jax.jit
  def run(params, strength):
    return generate(
      Scar(cfg),
      {'params': params},
      Conditions(label=jnp.asarray(a['labels'])),
      jnp.arange(2, dtype=jnp.uint32),
      jnp.stack([1 + strength, 1.0, 1.0]),
      SamplerConfig(temperature=0.0, ramp='sets'),
      trace=True,
      accumulate=accumulator(*tokenizer),
    ).raw

  for strength, suffix in ((1.5, ''), (4.0, '_cfg4')):
    raw = np.concatenate(run(var.convert(cfg, state), strength))
    expected = golden('sampling')[1][f'var_guid_raw{suffix}']
    np.testing.assert_allclose(raw, expected, **CLOSE)


PREFIX = PrefixConfig('full', k=2, grid=(4, 4), width=6, out=16)


def _tiny(tokenizer, prefix=PREFIX, **changes):
  cfg = ScarConfig(
    **{
      'decoder': DecoderConfig(
        width=16, layers=2, heads=2, vocab=64, block='adaln', mlp_hidden=16
      ),
      'prefix': prefix,
      'text': var.TextCondition('label', classes=5),
      'order': 'scale',
      'grid': (4, 4),
      'patch_nums': (1, 2, 3, 4),
      'latent_dim': 16,
      **changes,
    }
  )
  cond = empty_conditions(cfg, 2)
  tokens = jnp.zeros((2, 30), jnp.int32)
  add = accumulator(*tokenizer)
  init = functools.partial(Scar(cfg).init, accumulate=add)
  shapes = jax.eval_shape(init, jax.random.key(0), tokens, cond)['params']
  cond = cond.replace(label=jnp.array([1, 4]))
  if cond.features is not None:
    shape = cond.features.shape
    cond = cond.replace(features=jax.random.normal(jax.random.key(2), shape))
  params = noisy(unbox(shapes), scale=0.4)
  tokens = jax.random.randint(jax.random.key(1), (2, 30), 0, 64)
  return Scar(cfg), {'params': params}, cond, tokens, add


@pytest.mark.parametrize(
  ('prefix_mask', 'mode'), [('bidirectional', 'text'), ('causal', 'none')]
)
def test_forced_sampling_after_a_prefix_equals_the_full_pass(
  tokenizer, prefix_mask, mode
):
  model, variables, cond, tokens, add = _tiny(
    tokenizer, prefix_mask=prefix_mask
  )

  @jax.jit
  def run(tokens):
    seen = model.apply(variables, tokens, cond, accumulate=add)
    sampled = generate(
      model,
      variables,
      cond,
      jnp.arange(2, dtype=jnp.uint32),
      jnp.array([2.0, 1.0, 1.0]),
      SamplerConfig(guidance_mode=mode),
      forced=tokens,
      trace=True,
      accumulate=add,
    )
    return seen, sampled

  full, sampled = run(tokens)
  np.testing.assert_array_equal(sampled.tokens, tokens)
  np.testing.assert_allclose(sampled.raw[0], full.logits, **CLOSE)
  assert full.hidden.shape == (2, 4 + 30, 16)
  assert full.hidden_prefix.shape == (2, 4, 16)
  assert np.abs(full.logits).max() > 0.5


def test_a_scale_sees_the_prefix_and_earlier_scales_only(tokenizer):
  model, variables, cond, tokens, add = _tiny(tokenizer)
  run = jax.jit(
    lambda t, c: model.apply(variables, t, c, accumulate=add).logits
  )
  base = run(tokens, cond)
  scale_of = np.repeat(np.arange(4), (1, 4, 9, 16))
  for n in (0, 3, 8, 29):
    changed = tokens.at[:, n].set((tokens[:, n] + 7) % 64)
    moved = np.abs(run(changed, cond) - base).max((0, 2)) > 1e-7
    np.testing.assert_array_equal(moved, scale_of > scale_of[n])
  other = cond.replace(features=cond.features + 1)
  assert (np.abs(run(tokens, other) - base).max((0, 2)) > 1e-5).all()
  other = cond.replace(label=jnp.array([2, 4]))
  moved = np.abs(run(tokens, other) - base).max((1, 2)) > 1e-5
  assert moved.tolist() == [True, False]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'order': 'raster'}, r"'raster' with block='adaln'; accepted: 'scale'"),
    ({'decoder': DecoderConfig(width=16)}, r"'scale' with block='llama'"),
    ({'grid': (4, 5)}, r'patch_nums=\(1, 2, 3, 4\) for .*\(4, 5\)'),
    ({'patch_nums': ()}, r'patch_nums=\(\) for a token grid'),
    (
      {
        'text': var.TextCondition('none'),
        'prefix': PrefixConfig('off', out=16),
      },
      'without prefix and without text has nothing to start from',
    ),
    (
      {'prefix': PrefixConfig('vq', grid=(4, 4), width=16, out=16)},
      r"prefix.compress='vq' with order='scale'",
    ),
  ],
)
def test_impossible_scale_models_are_errors(tokenizer, changes, message):
  with pytest.raises(ValueError, match=message):
    _tiny(tokenizer, **changes)


def test_the_tokenizer_is_asked_for(tokenizer):
  model, variables, cond, tokens, _ = _tiny(tokenizer)
  with pytest.raises(ValueError, match='got accumulate=None'):
    model.apply(variables, tokens, cond)
