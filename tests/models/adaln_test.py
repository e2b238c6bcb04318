"""The adaln block against VAR's transformer: logits, layers, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.convert import var as var_names
from scar_jax.convert.common import assemble, disassemble
from scar_jax.convert.llamagen_gpt import abstract_decoder
from scar_jax.models.decoder import DecoderConfig, SetDecoder, make_cache
from scar_jax.orders import ScaleOrder, make_layout

ORDER = ScaleOrder((1, 2, 3, 4))
IDS = make_layout(ORDER, None, 0).set_ids


def _cfg(name: str) -> DecoderConfig:
  return DecoderConfig(
    width=32,
    layers=2,
    heads=4,
    vocab=64,
    mlp_hidden=64,
    norm_eps=1e-6,
    block='adaln',
    qk_norm=name != 'var_noqknorm',
    shared_ada=name == 'var_shared_aln',
    resid_dropout=0.0,
    ffn_dropout=0.0,
  )


# The input tables are built here by hand; var_test.py has the whole model.
SKIP = (
  *var_names.SKIP,
  *(r'class_emb\..*', r'lvl_embed\..*', r'word_embed\..*', r'pos_.*'),
)


def _input(weights, arrays, labels):
  """Embeddings and condition as VAR builds them."""
  cond = weights['class_emb.weight'][labels]
  start = cond[:, None] + weights['pos_start']
  word = arrays['x_BLCv_wo_first_l'] @ weights['word_embed.weight'].T
  x = np.concatenate([start, word + weights['word_embed.bias']], axis=1)
  levels = np.repeat(np.arange(4), ORDER.set_sizes)
  return x + weights['lvl_embed.weight'][levels] + weights['pos_1LC'], cond


@pytest.fixture(
  scope='module', params=['var', 'var_shared_aln', 'var_noqknorm']
)
def var(request, golden):
  weights, arrays = golden(request.param)
  cfg = _cfg(request.param)
  params = assemble(
    var_names.decoder_table(cfg), weights, abstract_decoder(cfg), SKIP
  )
  return request.param, cfg, params, weights, arrays


def test_logits_and_layers_equal_the_reference(var):
  _, cfg, params, weights, a = var

  @jax.jit
  def run(x, cond):
    (hidden, _), state = SetDecoder(cfg).apply(
      {'params': params}, x, None, IDS, cond=cond, mutable=['intermediates']
    )
    logits = SetDecoder(cfg).apply({'params': params}, hidden, method='logits')
    return logits, state['intermediates']['layers']['block'][0]

  logits, blocks = run(*_input(weights, a, a['labels']))
  for i in range(2):
    expected = a[f'hidden_block{i}']
    np.testing.assert_allclose(blocks[i], expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(logits, a['logits'], rtol=1e-4, atol=1e-4)
  null = np.full_like(a['labels'], 10)
  logits, _ = run(*_input(weights, a, null))
  np.testing.assert_allclose(logits, a['logits_null'], rtol=1e-4, atol=1e-4)


def test_decoding_by_scales_equals_the_reference(var):
  name, cfg, params, weights, a = var
  if name != 'var':
    pytest.skip('one variant: the cache is the same code')
  x, cond = _input(weights, a, a['labels'])

  @jax.jit
  def run(x, cond):
    cache, first, parts = make_cache(cfg, 2, 32), 0, []
    for size in ORDER.set_sizes:
      here = slice(first, first + size)
      hidden, cache = SetDecoder(cfg).apply(
        {'params': params}, x[:, here], None, IDS[here], cache, cond=cond
      )
      parts.append(hidden)
      first += size
    hidden = jnp.concatenate(parts, axis=1)
    return SetDecoder(cfg).apply({'params': params}, hidden, method='logits')

  np.testing.assert_allclose(run(x, cond), a['logits'], rtol=1e-4, atol=1e-4)


def test_gradients_equal_the_reference(golden):
  weights, a = golden('var')
  expected = golden('var', 'var_grads')[0]
  cfg = _cfg('var')
  params = assemble(
    var_names.decoder_table(cfg), weights, abstract_decoder(cfg), SKIP
  )
  x, cond = _input(weights, a, a['labels'])

  def loss(params):
    hidden, _ = SetDecoder(cfg).apply(
      {'params': params}, x, None, IDS, cond=cond
    )
    logits = SetDecoder(cfg).apply({'params': params}, hidden, method='logits')
    logp = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logp, a['targets'][..., None], -1).mean()

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, a['loss'], rtol=1e-5)
  for name, ours in disassemble(var_names.decoder_table(cfg), grads).items():
    scale = np.abs(expected[name]).max()
    np.testing.assert_allclose(
      ours, expected[name], rtol=1e-3, atol=1e-3 * scale, err_msg=name
    )
