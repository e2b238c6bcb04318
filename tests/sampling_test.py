import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import (
  tiny_config,
  tiny_model,
)

from scar_jax.filters import SamplerConfig
from scar_jax.models import stack, unstacked
from scar_jax.models.cache import empty_cache
from scar_jax.models.conditions import Conditions
from scar_jax.models.scar import Scar
from scar_jax.models.text_embedder import TextCondition
from scar_jax.sampling import Sampler
from scar_jax.sampling_loop import (
  PERMUTATION,
  cache_size,
  sample_keys,
  stack_branches,
)


@pytest.fixture(scope='module')
def tiny():
  return tiny_model(tiny_config(cond_dropout='joint'))


MODES = {
  'none': {},
  'text': {'guidance': 2.5},
  'image': {'guidance': 2.5},
  'image_text': {'guidance': 2.5, 'guidance_image': 1.5},
}


@pytest.mark.parametrize('mode', list(MODES))
def test_cached_logits_are_the_teacher_forced_ones(tiny, mode):
  model, variables, cond = tiny
  sampler = Sampler(model, SamplerConfig(guidance_mode=mode, **MODES[mode]))
  out = sampler.run(variables, cond, [5, 6, 7], trace=True)
  stacked = stack_branches(cond, mode)
  branches = len(out.raw)
  tokens = jnp.concatenate([out.tokens] * branches)  # the same in every branch
  full = jax.jit(model.apply)(variables, tokens, stacked).logits
  np.testing.assert_allclose(
    np.concatenate(out.raw), full, rtol=1e-4, atol=1e-4
  )


def test_layers_taken_apart_give_the_same(tiny, monkeypatch):
  model, variables, cond = tiny
  cache = empty_cache(1, 2, 6, 3, 4, 'float32')

  def taken():
    params, held = stack.taken_apart(variables, cache, 5)
    assert ('layers' in params['params']['decoder']) == (held is cache)
    return held

  assert taken() is cache  # too small to matter
  settings = SamplerConfig(guidance=2.5)
  want = Sampler(model, settings).run(variables, cond, [5, 6, 7], trace=True)
  monkeypatch.setattr(unstacked, '_LARGE', 0)
  assert [x.shape for x in taken().k] == [(2, 3, 5, 4)]
  sampler = Sampler(model, settings)
  out = sampler.run(variables, cond, [5, 6, 7], trace=True)
  np.testing.assert_array_equal(out.tokens, want.tokens)
  np.testing.assert_allclose(out.raw, want.raw, rtol=1e-5, atol=1e-5)
  # Piece by piece the cache is put together in between.
  [*_, grown] = sampler.stream(variables, cond, [5, 6, 7])
  np.testing.assert_array_equal(grown.tokens, want.tokens)
  monkeypatch.setattr(unstacked, 'platform', lambda: 'tpu')
  assert taken() is cache


def test_cached_logits_with_hidden_padding_on_either_side():
  text = TextCondition(kind='t5', length=3, width=5, mask_pad=True)
  model, variables, cond = tiny_model(tiny_config(text=text))
  mask = [[True, False, False], [False, True, True], [True, True, True]]
  cond = cond.replace(text_mask=jnp.array(mask))
  sampler = Sampler(model, SamplerConfig(guidance=2.0))
  out = sampler.run(variables, cond, [1, 2, 3], trace=True)
  tokens = jnp.concatenate([out.tokens] * 2)
  full = jax.jit(model.apply)(variables, tokens, stack_branches(cond, 'text'))
  np.testing.assert_allclose(
    np.concatenate(out.raw), full.logits, rtol=1e-4, atol=1e-4
  )


def test_random_order_is_cached_exactly():
  """Sets of 1 and 5 tokens, one permutation for each sample."""
  model, variables, cond = tiny_model(tiny_config(order='random', num_sets=2))
  seeds = jnp.array([4, 5, 6], jnp.uint32)
  settings = SamplerConfig(guidance=2.0, ramp='tokens')
  out = Sampler(model, settings).run(variables, cond, seeds, trace=True)
  order = model.cfg.make_order()
  perm = order.start(3, sample_keys(seeds, PERMUTATION)).perm
  assert len({tuple(row) for row in perm.tolist()}) == 3
  full = jax.jit(model.apply)(
    variables,
    jnp.concatenate([out.tokens] * 2),
    stack_branches(cond, 'text'),
    perm=jnp.concatenate([perm] * 2),
  )
  np.testing.assert_allclose(
    np.concatenate(out.raw), full.logits, rtol=1e-4, atol=1e-4
  )
  first = order.set_sizes[0]  # no guidance before the first token
  np.testing.assert_array_equal(out.guided[:, :first], out.raw[0][:, :first])


def test_forced_tokens_replace_the_draws(tiny):
  model, variables, cond = tiny
  sampler = Sampler(model, SamplerConfig(guidance=2.0))
  forced = jnp.arange(18).reshape(3, 6) % 11
  out = sampler.run(variables, cond, [0, 0, 0], forced=forced, trace=True)
  np.testing.assert_array_equal(out.tokens, forced)
  full = jax.jit(model.apply)(variables, forced, cond).logits
  np.testing.assert_allclose(out.raw[0], full, rtol=1e-4, atol=1e-4)


def test_scale_one_gives_the_conditional_logits_bit_for_bit(tiny):
  model, variables, cond = tiny
  sampler = Sampler(model, SamplerConfig(guidance=2.0, cfg_interval=1))
  out = sampler.run(variables, cond, [0, 1, 2], trace=True)
  np.testing.assert_array_equal(out.guided[:, 3:], out.raw[0][:, 3:])
  assert np.abs(out.guided[:, :3] - out.raw[0][:, :3]).max() > 1e-3


def test_a_sample_depends_on_its_seed_alone(tiny):
  model, variables, cond = tiny
  sampler = Sampler(model, SamplerConfig(guidance=2.0, top_k=8))
  seeds = np.array([11, 12, 13])
  together = np.asarray(sampler(variables, cond, seeds))
  turned = jax.tree.map(lambda x: x[::-1], cond)
  turned = np.asarray(sampler(variables, turned, seeds[::-1]))
  np.testing.assert_array_equal(turned[::-1], together)
  assert sampler.compilations == 1
  alone = jax.tree.map(lambda x: x[1:2], cond)
  alone = np.asarray(sampler(variables, alone, seeds[1:2]))
  np.testing.assert_array_equal(alone[0], together[1])
  assert sampler.compilations == 2  # another batch size
  same = jax.tree.map(lambda x: jnp.concatenate([x[:1]] * 3), cond)
  drawn = np.asarray(sampler(variables, same, seeds))
  assert len({tuple(row) for row in drawn}) == 3
  again = np.asarray(sampler(variables, same, seeds, guidance=2.0))
  np.testing.assert_array_equal(again, drawn)
  sampler(variables, same, seeds, guidance=7.5)
  assert sampler.compilations == 2
  sampler(variables, same, seeds, guidance=1.0)  # no null branch: a new one
  assert sampler.compilations == 3


def test_nan_weights_are_an_error_that_names_the_sample(tiny):
  model, variables, cond = tiny
  sampler = Sampler(model, SamplerConfig(guidance=2.0))
  broken = cond.replace(text=cond.text.at[1].set(jnp.nan))
  with pytest.raises(ValueError, match=r'samples \[1\] have logits with NaN'):
    sampler(variables, broken, [0, 1, 2])


def test_guidance_needs_a_null_condition():
  model = Scar(tiny_config())
  settings = SamplerConfig(guidance_mode='image', guidance=2.0)
  with pytest.raises(ValueError, match=r"'image' needs null .*: none, text "):
    Sampler(model, settings)({}, Conditions(), [0])
  model = Scar(tiny_config(text=TextCondition(kind='none')))
  with pytest.raises(ValueError, match=r"'text' needs null .*: none "):
    Sampler(model, SamplerConfig(guidance=2.0))({}, Conditions(), [0])


def test_branches_keep_null_rows_that_were_asked_for():
  cond = Conditions(label=jnp.arange(2), null_prefix=jnp.array([True, False]))
  stacked = stack_branches(cond, 'image_text')
  assert stacked.label.tolist() == [0, 1, 0, 1, 0, 1]
  assert stacked.null_text.tolist() == [False] * 2 + [True] * 4
  assert stacked.null_prefix.tolist() == [True, False] * 2 + [True] * 2


def test_cache_sizes_are_padded():
  assert [cache_size(n) for n in (1, 16, 17, 128, 129, 1399)] == [
    16, 16, 32, 128, 144, 1408,
  ]  # fmt: skip
