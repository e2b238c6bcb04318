"""The scale order with text: tokens in set 0, and pooled into the condition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import CLOSE, noisy

from scar_jax.filters import SamplerConfig
from scar_jax.models.blocks import ada_std
from scar_jax.models.conditions import empty_conditions
from scar_jax.models.decoder import DecoderConfig
from scar_jax.models.encoders.t5 import t5_config
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scale_inputs import ScaleInputs
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.text_embedder import TextCondition
from scar_jax.models.tokenizers.msvq import MSVQModel, accumulator
from scar_jax.models.tokenizers.msvq_config import MSVQConfig
from scar_jax.orders.scale import ScaleOrder, blank
from scar_jax.sampling import generate
from scar_jax.sharding import unbox

SIDES, N, VOCAB = (1, 2, 3), 14, 11
PREFIX = PrefixConfig('full', k=2, grid=(4, 4), width=6, out=16)
OFF = PrefixConfig('off', out=16)
BYTE = t5_config('byte', width=8, layers=1, heads=2, head_dim=4, ffn=8)
TEXTS = {
  't5': TextCondition('t5', 3, 5, mask_pad=True, null='learned'),
  'byte': TextCondition('byte', 3, 8, encoder=BYTE),
  'none': TextCondition('none'),
}
TOKENIZER = MSVQConfig(
  codes=VOCAB, code_dim=4, patch_nums=SIDES, phis=2, ch=8, ch_mult=(1,),
  res_blocks=1, groups=0, attn=False,
)  # fmt: skip


@pytest.fixture(scope='module')
def add():
  images = jnp.zeros((1, 3, 3, 3))
  shapes = jax.eval_shape(MSVQModel(TOKENIZER).init, jax.random.key(0), images)
  return accumulator(TOKENIZER, noisy(unbox(shapes['params']), scale=0.5))


def _config(kind, prefix, **changes):
  return ScarConfig(
    decoder=DecoderConfig(
      width=16, layers=2, heads=2, vocab=VOCAB, block='adaln', mlp_hidden=16
    ),
    prefix=prefix,
    text=TEXTS[kind],
    order='scale',
    grid=(3, 3),
    patch_nums=SIDES,
    latent_dim=4,
    **changes,
  )


def _fresh(cfg, batch=2):
  return functools.partial(
    Scar(cfg).init,
    jax.random.key(0),
    jnp.zeros((batch, N), jnp.int32),
    empty_conditions(cfg, batch),
    accumulate=blank(SIDES, 4),
  )


def _case(kind, prefix, **changes):
  """A model with random weights; conditions and tokens of two samples."""
  cfg = _config(kind, prefix, **changes)
  params = noisy(unbox(jax.eval_shape(_fresh(cfg))['params']), scale=0.4)
  cond, rng = empty_conditions(cfg, 2), np.random.default_rng(3)
  if cond.features is not None:
    drawn = jnp.asarray(rng.normal(size=cond.features.shape), jnp.float32)
    cond = cond.replace(features=drawn)
  if cond.text is not None:
    mask = jnp.array([[True, True, False], [True, True, True]])
    drawn = (
      jnp.asarray(rng.integers(3, 90, cond.text.shape), jnp.int32)
      if kind == 'byte'
      else jnp.asarray(rng.normal(size=cond.text.shape), jnp.float32)
    )
    cond = cond.replace(text=drawn, text_mask=mask)
  tokens = jnp.asarray(rng.integers(0, VOCAB, (2, N)), jnp.int32)
  return Scar(cfg), {'params': params}, cond, tokens


@pytest.mark.parametrize(
  ('kind', 'prefix'),
  [('t5', PREFIX), ('t5', OFF), ('byte', PREFIX), ('none', PREFIX)],
)
def test_cached_sampling_equals_teacher_forcing(add, kind, prefix):
  model, variables, cond, tokens = _case(kind, prefix)
  mode = 'none' if kind == 'none' else 'text'

  @jax.jit
  def run(tokens):
    sampled = generate(
      model,
      variables,
      cond,
      jnp.arange(2, dtype=jnp.uint32),
      jnp.array([2.0, 1.0, 1.0]),
      SamplerConfig(guidance_mode=mode, ramp='sets'),
      forced=tokens,
      trace=True,
      accumulate=add,
    )

    def full(null):
      given = cond.replace(null_text=jnp.full(2, null))
      return model.apply(variables, tokens, given, accumulate=add).logits

    return sampled, full(False), full(True)

  sampled, with_text, without = run(tokens)
  np.testing.assert_array_equal(sampled.tokens, tokens)
  np.testing.assert_allclose(sampled.raw[0], with_text, **CLOSE)
  assert np.abs(with_text).max() > 0.5
  if kind == 'none':
    return
  np.testing.assert_allclose(sampled.raw[1], without, **CLOSE)
  # The ramp: nothing is added at the first scale, all of it at the last.
  np.testing.assert_array_equal(sampled.guided[:, 0], sampled.raw[0][:, 0])
  want = sampled.raw[1] + 2.0 * (sampled.raw[0] - sampled.raw[1])
  np.testing.assert_allclose(sampled.guided[:, 5:], want[:, 5:], rtol=1e-5)


@pytest.mark.parametrize('prefix', [PREFIX, OFF], ids=['prefix', 'no_prefix'])
def test_a_scale_sees_set_0_and_earlier_scales_only(add, prefix):
  model, variables, cond, tokens = _case('t5', prefix)
  run = jax.jit(
    lambda t, c: model.apply(variables, t, c, accumulate=add).logits
  )
  base = run(tokens, cond)
  scale_of = np.repeat(np.arange(3), (1, 4, 9))
  for n in (0, 2, 4, 13):
    changed = tokens.at[:, n].set((tokens[:, n] + 5) % VOCAB)
    moved = np.abs(run(changed, cond) - base).max((0, 2)) > 1e-7
    np.testing.assert_array_equal(moved, scale_of > scale_of[n])
  other = run(tokens, cond.replace(text=cond.text.at[0, 0].add(1.0)))
  moved = np.abs(other - base).max(2) > 1e-6
  assert moved[0].all()
  assert not moved[1].any()


def test_hidden_words_and_null_texts_change_nothing(add):
  model, variables, cond, tokens = _case('t5', PREFIX)
  run = jax.jit(
    lambda c: model.apply(variables, tokens, c, accumulate=add).logits
  )
  base = run(cond)
  padding = cond.replace(text=cond.text.at[0, 2].add(9.0))
  np.testing.assert_array_equal(run(padding), base)
  null = jnp.array([True, False])
  first = run(cond.replace(null_text=null))
  np.testing.assert_array_equal(first[1], base[1])
  assert np.abs(first[0] - base[0]).max() > 1e-3
  again = cond.replace(null_text=null, text=cond.text.at[0].multiply(-3.0))
  np.testing.assert_array_equal(run(again), first)
  # An empty prompt is the null text, whatever guidance asks for.
  empty = cond.replace(text_mask=cond.text_mask.at[0].set(False))
  np.testing.assert_array_equal(run(empty.replace(null_text=null)), run(empty))


def test_a_new_model_starts_at_the_null_class():
  module = ScaleInputs(ScaleOrder(SIDES), 16, 0, (2, 2), 3)
  null, text = jnp.zeros(2, bool), jnp.ones((2, 3, 16))
  vector, variables = module.init_with_output(
    jax.random.key(0), null, None, text, text[..., 0] > 0, method='condition'
  )
  params = unbox(variables)['params']
  assert params['label'].shape == params['text_level'].shape == (1, 16)
  assert params['text_place'].shape == (3, 16)
  np.testing.assert_array_equal(vector, params['label'].repeat(2, 0))


def test_places_may_start_where_they_lie():
  order = ScaleOrder((1, 2, 4))
  module = ScaleInputs(order, 64, 0, (2, 2), 0, 'sincos')
  null = jnp.zeros(1, bool)
  variables = module.init(jax.random.key(0), null, method='condition')
  params = unbox(variables)['params']
  place, prefix = np.asarray(params['place']), params['prefix_place']
  # A prefix cell is that of the scale of its size, and nearest to its quarter.
  np.testing.assert_allclose(prefix, place[1:5], rtol=1e-5, atol=1e-6)
  nearest = np.argmax(place[5:] @ place[1:5].T, axis=1).reshape(4, 4)
  want = np.arange(4).reshape(2, 2).repeat(2, 0).repeat(2, 1)
  np.testing.assert_array_equal(nearest, want)
  np.testing.assert_allclose(np.std(place), ada_std(64), rtol=0.2)


def test_pooled_text_is_a_mean_over_its_words():
  model, variables, cond, _ = _case('t5', PREFIX)
  vector = model.apply(variables, cond, method='set0').vector

  def text(module):
    return module.text.text(cond.text, cond.text_mask, jnp.zeros(2, bool))[0]

  x = np.asarray(model.apply(variables, method=text))
  mean = np.stack([x[0, :2].mean(0), x[1].mean(0)])
  scale = variables['params']['scale']
  want = scale['label'][0] + mean @ scale['pooled']['kernel']
  np.testing.assert_allclose(vector, want, rtol=1e-5, atol=1e-6)


def test_text_tokens_have_places(add):
  """Two words in the other order are another prompt."""
  model, variables, cond, tokens = _case('t5', OFF)
  run = jax.jit(
    lambda c: model.apply(variables, tokens, c, accumulate=add).logits
  )
  turned = cond.replace(text=cond.text[:, jnp.array([1, 0, 2])])
  assert np.abs(run(turned) - run(cond)).max() > 1e-4
