"""Sampling in the random order: any number of steps, known tokens, confidence.

Tolerances: cached and teacher-forced logits agree to 1e-4 in float32 (logits
are of size 1 to 10), to 6e-2 in bfloat16, whose keys are rounded to 8 bits.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import OFF, tiny_config, tiny_model

from scar_jax.filters import SamplerConfig
from scar_jax.models.scar import Scar
from scar_jax.orders import Known, RandomOrder
from scar_jax.sampling import Sampler
from scar_jax.sampling_loop import stack_branches

N = 12
SEEDS = np.array([4, 5, 6])
TOLERANCE = {'float32': 1e-4, 'bfloat16': 6e-2}


def _random_config(sets=3, **changes):
  return tiny_config(order='random', grid=(3, 4), num_sets=sets, **changes)


@pytest.fixture(scope='module')
def tiny():
  return tiny_model(_random_config())


def _forced(seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 11, (3, N)))


def _full(model, variables, cond, out, sets):
  """Teacher-forced logits of all branches, in the sampler's permutation."""
  model = Scar(dataclasses.replace(model.cfg, num_sets=sets))
  full = jax.jit(model.apply)(
    variables,
    jnp.concatenate([out.tokens] * 2),
    stack_branches(cond, 'text'),
    perm=jnp.concatenate([out.perm] * 2),
  )
  return full.logits.reshape(2, 3, N, -1)


@pytest.mark.parametrize(
  ('sets', 'prefix', 'prefix_mask', 'dtype'),
  [
    (1, True, 'bidirectional', 'float32'),
    (N, True, 'bidirectional', 'float32'),
    (3, True, 'causal', 'float32'),
    (3, False, 'causal', 'float32'),
    (3, True, 'bidirectional', 'bfloat16'),
  ],
)
def test_cached_sampling_with_forced_tokens_is_teacher_forcing(
  sets, prefix, prefix_mask, dtype
):
  without = {} if prefix else {'prefix': dataclasses.replace(OFF, out=16)}
  cfg = _random_config(prefix_mask=prefix_mask, **without)
  cfg = dataclasses.replace(
    cfg, decoder=dataclasses.replace(cfg.decoder, dtype=dtype)
  )
  model, variables, cond = tiny_model(cfg)
  # Trained with 3 sets, sampled with others.
  sampler = Sampler(model, SamplerConfig(guidance=2.0, num_sets=sets))
  forced = _forced()
  out = sampler.run(variables, cond, SEEDS, forced=forced, trace=True)
  order = RandomOrder((3, 4), sets)
  np.testing.assert_array_equal(order.targets(out.tokens, out.perm), forced)
  full = _full(model, variables, cond, out, sets)
  assert np.abs(full).max() > 1
  np.testing.assert_allclose(
    out.raw, full, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
  )


@pytest.mark.parametrize('sets', [3, N])
def test_logits_of_a_set_know_nothing_of_it_or_of_later_sets(tiny, sets):
  model, variables, cond = tiny
  sampler = Sampler(model, SamplerConfig(guidance_mode='none', num_sets=sets))
  sizes = RandomOrder((3, 4), sets).set_sizes
  set_of = np.repeat(np.arange(len(sizes)), sizes)
  forced = _forced()

  def logits(tokens):
    run = sampler.run(variables, cond, SEEDS, forced=tokens, trace=True)
    return np.asarray(run.raw[0])

  base = logits(forced)
  for n in range(N):
    changed = forced.at[:, n].set((forced[:, n] + 4) % 11)
    moved = np.abs(logits(changed) - base).max((0, 2)) > 1e-7
    assert not moved[set_of <= set_of[n]].any()
    assert moved[set_of > set_of[n]].all()
  assert sampler.compilations == 1


def test_number_of_steps_is_free_and_the_default_is_that_of_training(tiny):
  model, variables, cond = tiny
  trained = Sampler(model, SamplerConfig(guidance=2.0))
  default = trained(variables, cond, SEEDS)
  for sets in (2, 3):
    sampler = Sampler(model, SamplerConfig(guidance=2.0, num_sets=sets))
    tokens = sampler(variables, cond, SEEDS)
    np.testing.assert_array_equal(tokens, sampler(variables, cond, SEEDS))
    assert sampler.compilations == 1
    assert np.array_equal(tokens, default) == (sets == 3)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      {'num_sets': 4},
      r"sample\.num_sets=4 .* 'raster', .*accepted: 0, or",
    ),
    ({'schedule': 'confidence'}, r"sample\.schedule='confidence' .* 'raster'"),
  ],
)
def test_other_orders_have_fixed_steps(settings, message):
  sampler = Sampler(
    Scar(tiny_config()), SamplerConfig(guidance=1.0, **settings)
  )
  with pytest.raises(ValueError, match=message):
    sampler({}, tiny_model(tiny_config())[2], SEEDS)


def test_more_steps_than_tokens_are_refused(tiny):
  model, variables, cond = tiny
  sampler = Sampler(model, SamplerConfig(num_sets=N + 1))
  with pytest.raises(ValueError, match='num_sets=13 for 12 tokens; accepted'):
    sampler(variables, cond, SEEDS)


def _known(count, given, seed=1):
  """`count` known cells in each sample, other ones in each."""
  rng = np.random.default_rng(seed)
  keep = np.stack([rng.permutation(N) < count for _ in range(3)])
  return Known(_forced(seed), jnp.asarray(keep), given)


@pytest.mark.parametrize(
  ('count', 'given', 'schedule'),
  [
    (3, 2, 'random'),
    (2, 0, 'random'),
    (11, 10, 'random'),
    (3, 2, 'confidence'),
  ],
)
def test_known_tokens_are_kept_and_seen(tiny, count, given, schedule):
  model, variables, cond = tiny
  settings = SamplerConfig(guidance=2.0, schedule=schedule)
  known = _known(count, given)
  sampler = Sampler(model, settings)
  out = sampler.run(variables, cond, SEEDS, known=known, trace=True)
  keep = np.asarray(known.keep)
  np.testing.assert_array_equal(
    np.asarray(out.tokens)[keep], np.asarray(known.tokens)[keep]
  )
  # What is drawn has seen all that was given, exactly as in training: the
  # logits are those of a teacher-forced pass over the same sets.
  order = RandomOrder((3, 4), 3, given)
  inputs = order.train_inputs(out.tokens, out.perm)
  assert out.raw.shape[2] == N - given
  model_sets = _ForcedSets(order)
  full = model_sets.logits(model, variables, cond, inputs)
  np.testing.assert_allclose(out.raw, full[:, :, given:], rtol=1e-4, atol=1e-4)
  other = known.replace(tokens=(known.tokens + 1) % 11)
  moved = sampler.run(variables, cond, SEEDS, known=other, trace=True)
  assert np.abs(moved.raw[..., -1, :] - out.raw[..., -1, :]).max() > 1e-3
  assert sampler.compilations == 1


class _ForcedSets:
  """A teacher-forced pass over the sets of any random order, uncached."""

  def __init__(self, order):
    self.order = order

  def logits(self, model, variables, cond, inputs):
    stacked = stack_branches(cond, 'text')
    twice = inputs.replace(
      tokens=jnp.concatenate([inputs.tokens] * 2),
      positions=jnp.concatenate([inputs.positions] * 2),
    )

    @jax.jit
    def run(variables):
      # One step over all sets: the mask is that of the set ids alone.
      _, cache, vector = model.apply(variables, stacked, 128, method='prefill')
      return model.apply(variables, twice, cache, vector, method='decode')[0]

    logits = run(variables)[:, self.order.logit_index]
    return logits.reshape(2, 3, N, -1)


def test_confidence_chooses_places_and_draws_from_the_model(tiny):
  model, variables, cond = tiny
  settings = SamplerConfig(
    guidance=2.0, schedule='confidence', schedule_noise=0.0
  )
  out = Sampler(model, settings).run(variables, cond, SEEDS, trace=True)
  assert sorted(out.perm[0].tolist()) == list(range(N))
  full = _full(model, variables, cond, out, 3)
  np.testing.assert_allclose(out.raw, full, rtol=1e-4, atol=1e-4)
  # The first set holds the places that are surest when asked for alone.
  alone = []
  single = jax.jit(Scar(dataclasses.replace(model.cfg, num_sets=N)).apply)
  for cell in range(N):
    perm = jnp.asarray([[cell, *(c for c in range(N) if c != cell)]] * 3)
    logits = single(
      variables,
      jnp.concatenate([out.tokens] * 2),
      stack_branches(cond, 'text'),
      perm=jnp.concatenate([perm] * 2),
    ).logits[:, 0]
    guided = logits[3:] + 2.0 * (logits[:3] - logits[3:])
    alone.append(jax.nn.log_softmax(guided).max(-1))
  best = np.argsort(-np.stack(alone, 1), axis=1)
  count = RandomOrder((3, 4), 3).set_sizes[0]
  np.testing.assert_array_equal(out.perm[:, :count], best[:, :count])


def test_confidence_noise_changes_places_by_the_seed_alone(tiny):
  model, variables, cond = tiny
  settings = SamplerConfig(
    temperature=0.0, schedule='confidence', schedule_noise=5.0
  )
  sampler = Sampler(model, settings)
  same = jax.tree.map(lambda x: jnp.concatenate([x[:1]] * 3), cond)
  perm = sampler.run(variables, same, SEEDS, trace=True).perm.tolist()
  assert len({tuple(row) for row in perm}) == 3
  again = sampler.run(variables, same, SEEDS[::-1], trace=True).perm.tolist()
  assert again[::-1] == perm
