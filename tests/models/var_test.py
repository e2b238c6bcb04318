"""VAR as a `Scar` in the scale order: parity, and its own invariants."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import CLOSE, noisy

from scar_jax import objectives
from scar_jax.convert import var, var_vqvae
from scar_jax.convert.common import disassemble
from scar_jax.filters import SamplerConfig
from scar_jax.models.decoder import DecoderConfig
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar import Conditions, Scar, empty_conditions
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.tokenizers.msvq import MSVQModel, accumulator
from scar_jax.sampling import generate
from scar_jax.sharding import unbox

NAMES = ('var', 'var_shared_aln', 'var_noqknorm')


@pytest.fixture(scope='module')
def tokenizer(golden):
  state, _ = golden('var_vqvae')
  cfg = var_vqvae.detect(state, (1, 2, 3, 4))
  return cfg, var_vqvae.convert(cfg, state)


def _load(golden, name):
  state, arrays = golden(name)
  cfg = var.detect(state, heads=4).model
  return cfg, var.convert(cfg, state), arrays


@pytest.fixture(scope='module', params=NAMES)
def reference(request, golden):
  return request.param, *_load(golden, request.param)


def _loss(cfg, tokenizer, params, arrays):
  out = Scar(cfg).apply(
    {'params': params},
    arrays['targets'],
    Conditions(label=jnp.asarray(arrays['labels'])),
    accumulate=accumulator(*tokenizer),
  )
  return objectives.cross_entropy(out.logits, out.targets)[0], out


def test_logits_and_layers_match_the_reference(reference, tokenizer):
  _, cfg, params, a = reference
  model, add = Scar(cfg), accumulator(*tokenizer)

  @jax.jit
  def run(cond):
    return model.apply(
      {'params': params},
      a['targets'],
      cond,
      accumulate=add,
      mutable=['intermediates'],
    )

  out, state = run(Conditions(label=jnp.asarray(a['labels'])))
  np.testing.assert_allclose(out.logits, a['logits'], **CLOSE)
  blocks = state['intermediates']['decoder']['layers']['block'][0]
  for i in range(2):
    np.testing.assert_allclose(blocks[i], a[f'hidden_block{i}'], **CLOSE)
  loss, _ = objectives.cross_entropy(out.logits, out.targets)
  np.testing.assert_allclose(loss, a['loss'], rtol=1e-5)
  null = jnp.ones(2, bool)
  by_flag, _ = run(Conditions(label=jnp.asarray(a['labels']), null_text=null))
  np.testing.assert_allclose(by_flag.logits, a['logits_null'], **CLOSE)
  by_id, _ = run(Conditions(label=jnp.full(2, 10)))
  np.testing.assert_array_equal(by_id.logits, by_flag.logits)


def test_gradients_match_the_reference(
  reference, tokenizer, golden, golden_path
):
  name, cfg, params, a = reference
  loss = functools.partial(_loss, cfg, tokenizer)
  (value, _), grads = jax.jit(
    jax.value_and_grad(lambda p: loss(p, a), has_aux=True)
  )(params)
  np.testing.assert_allclose(value, a['loss'], rtol=1e-5)
  ours = disassemble(var.table(cfg), grads)
  norms = json.loads(golden_path(f'{name}.json').read_text())['grad_l2']
  assert set(ours) == set(norms)
  for key, norm in norms.items():
    got = np.linalg.norm(ours[key])
    np.testing.assert_allclose(got, norm, rtol=1e-3, err_msg=key)
  if name != 'var':
    return
  expected = golden('var', 'var_grads')[0]
  assert set(ours) == set(expected)
  for key, grad in ours.items():
    scale = np.abs(expected[key]).max()
    np.testing.assert_allclose(
      grad, expected[key], rtol=1e-3, atol=1e-3 * scale, err_msg=key
    )


@pytest.mark.parametrize(('strength', 'suffix'), [(1.5, ''), (4.0, '_cfg4')])
def test_greedy_images_match_the_reference(
  reference, tokenizer, golden, strength, suffix
):
  name, cfg, params, a = reference
  settings = SamplerConfig(temperature=0.0, ramp='sets')

  @jax.jit
  def run(params):
    # VAR's cfg t is a guidance scale of 1 + t.
    out = generate(
      Scar(cfg),
      {'params': params},
      Conditions(label=jnp.asarray(a['labels'])),
      jnp.arange(2, dtype=jnp.uint32),
      jnp.array([1 + strength, 1.0]),
      settings,
      trace=True,
      accumulate=accumulator(*tokenizer),
    )
    image = MSVQModel(tokenizer[0]).apply(
      {'params': tokenizer[1]}, out.tokens, method='decode_tokens'
    )
    return out, (jnp.clip(image, -1, 1) + 1) / 2

  out, image = run(params)
  np.testing.assert_array_equal(out.tokens, a[f'gen_ids{suffix}'])
  np.testing.assert_allclose(
    out.guided, a[f'gen_logits{suffix}'], rtol=1e-4, atol=5e-4
  )
  expected = a[f'gen_image{suffix}'].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(image, expected, atol=2e-4)
  if name == 'var':
    raw = golden('sampling')[1][f'var_guid_raw{suffix}']
    np.testing.assert_allclose(np.concatenate(out.raw), raw, **CLOSE)


# Wrong on purpose: our parameter, and what happens to it.
MISTAKES = {
  'q and k swapped': (
    'decoder/layers/attn/qkv/kernel',
    lambda x: x[:, :, [1, 0, 2]],
  ),
  'no scale of q': ('decoder/layers/attn/log_scale', jnp.zeros_like),
  'no bias of q': ('decoder/layers/attn/q_bias', jnp.zeros_like),
  'gate and shift swapped': (
    'decoder/layers/ada/kernel',
    lambda x: jnp.roll(x, 2 * 32, axis=-1),
  ),
  'shift before scale': (
    'decoder/head_ada/kernel',
    lambda x: jnp.roll(x, 32, axis=-1),
  ),
  'levels shifted': ('scale/level', lambda x: jnp.roll(x, 1, axis=0)),
  'head transposed': (
    'decoder/layers/attn/out/kernel',
    lambda x: x.swapaxes(1, 2).reshape(x.shape),
  ),
}


@pytest.fixture(scope='module')
def logits(golden, tokenizer):
  """Teacher-forced logits of `var` with given parameters, compiled once."""
  cfg, _, a = _load(golden, 'var')
  return jax.jit(lambda p: _loss(cfg, tokenizer, p, a)[1].logits)


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_shows(golden, logits, mistake):
  """The parity tests above can fail."""
  _, params, a = _load(golden, 'var')
  path, change = MISTAKES[mistake]
  *parents, last = path.split('/')
  node = params
  for key in parents:
    node = node[key]
  node[last] = change(node[last])
  assert np.abs(logits(params) - a['logits']).max() > 1e-2


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


@pytest.mark.parametrize('prefix_mask', ['bidirectional', 'causal'])
@pytest.mark.parametrize('mode', ['none', 'text'])
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
      jnp.array([2.0, 1.0]),
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
