"""SetDecoder: LlamaGen's evaluation of all positions, and invariants."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy

from scar_jax.convert import llamagen_gpt as names
from scar_jax.convert.common import assemble, disassemble
from scar_jax.models.decoder import (
  DecoderConfig,
  SetDecoder,
  decoder_size,
  make_cache,
)
from scar_jax.models.layers import rope_table
from scar_jax.sharding import unbox

CFG = DecoderConfig(
  width=64, layers=2, heads=4, vocab=64, multiple_of=32, resid_dropout=0.0
)


def _rope(length: int):
  """Class row (zero) and the rows of `length - 1` tokens of a 4 x 4 grid."""
  grid = np.indices((4, 4)).reshape(2, -1).T.astype(np.float32)
  positions = np.concatenate([np.zeros((1, 2), np.float32), grid])[:length]
  return rope_table(positions, 16, zero_rows=np.arange(length) == 0)


def _embed(weights, ids, labels):
  tokens = weights['tok_embeddings.weight'][ids]
  table = weights['cls_embedding.embedding_table.weight']
  return jnp.concatenate([table[labels][:, None], tokens], axis=1)


def _forward(params, x, cfg=CFG, **kwargs):
  model, length = SetDecoder(cfg), x.shape[1]

  @jax.jit
  def run(params, x):
    hidden, _ = model.apply(
      {'params': params}, x, _rope(length), np.arange(length), **kwargs
    )
    return model.apply({'params': params}, hidden, method='logits'), hidden

  return run(params, x)


@pytest.fixture(scope='module')
def c2i(golden):
  weights, arrays = golden('gpt_c2i')
  return names.convert_decoder(CFG, weights), weights, arrays


def test_all_positions_in_evaluation_equal_the_reference(c2i):
  params, weights, a = c2i
  x = _embed(weights, a['ids'], a['labels'])
  ours, _ = _forward(params, x)
  np.testing.assert_allclose(ours, a['logits_eval_full'], rtol=1e-4, atol=1e-4)
  assert (ours.argmax(-1) == a['logits_eval_full'].argmax(-1)).all()


@pytest.mark.parametrize('sizes', [(1,) * 16, (1, 15), (5, 3, 8)])
def test_decoding_through_the_cache_equals_the_full_pass(c2i, sizes):
  params, weights, a = c2i
  x = _embed(weights, a['ids'][:, :-1], a['labels'])
  full, _ = _forward(params, x)
  cos, sin = _rope(16)
  cache, first, parts = make_cache(CFG, 2, 20), 0, []
  step = jax.jit(functools.partial(SetDecoder(CFG).apply, {'params': params}))
  for size in sizes:
    here = slice(first, first + size)
    ids = np.arange(16)[here]
    hidden, cache = step(x[:, here], (cos[here], sin[here]), ids, cache)
    parts.append(hidden)
    first += size
  hidden = jnp.concatenate(parts, axis=1)
  ours = SetDecoder(CFG).apply({'params': params}, hidden, method='logits')
  np.testing.assert_allclose(ours, full, atol=1e-4)
  assert int(cache.length) == 16


def test_masked_keys_change_nothing_but_themselves(c2i):
  params, weights, a = c2i
  x = _embed(weights, a['ids'][:, :-1], a['labels'])
  valid = np.ones((2, 16), bool)
  valid[0, 3] = False
  changed = x.at[:, 3].add(1.0)
  base = _forward(params, x, key_valid=valid)[0]
  other = _forward(params, changed, key_valid=valid)[0]
  differs = np.abs(base - other).max(-1) > 1e-6
  assert differs[0].tolist() == [i == 3 for i in range(16)]
  assert differs[1, 3:].all()
  assert not differs[1, :3].any()


def test_scan_unroll_and_remat_give_equal_outputs_and_gradients(c2i):
  params, weights, a = c2i
  x = _embed(weights, a['ids'][:, :-1], a['labels'])

  def run(**changes):
    cfg = DecoderConfig(
      width=64,
      layers=2,
      heads=4,
      vocab=64,
      multiple_of=32,
      resid_dropout=0.5,
      ffn_dropout=0.5,
      drop_path=0.2,
      attn_dropout=0.1,
      **changes,
    )

    def loss(params, x):
      logits = _forward(
        params,
        x,
        cfg,
        deterministic=False,
        rngs={'dropout': jax.random.key(3)},
      )[0]
      return (jax.nn.log_softmax(logits) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

  base = run()
  # Each policy once, with a scan and without.
  for changes in (
    {'remat': 'full', 'scan': False},
    {'remat': 'dots'},
    {'remat': 'dots_no_batch', 'scan': False},
    {'remat': 'attention'},
  ):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      run(**changes),
      base,
      is_leaf=lambda x: x is None,
    )


def test_offload_keeps_the_inputs_of_layers_on_the_host_and_nothing_else():
  cfg = decoder_size('tiny', width=64, layers=3, heads=4, remat='offload')
  model, x = SetDecoder(cfg), jnp.zeros((2, 5, 64))

  def run(variables):
    return model.apply(variables, x, None, np.arange(5))[0].sum()

  init = functools.partial(model.init, x=x, rope=None, set_ids=np.arange(5))
  variables = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
  text = str(jax.make_jaxpr(jax.grad(run))(variables))
  # Stacked over the layers there are weights, their gradients, and this.
  assert 'f32<host>[3,2,5,64] = scan' in text
  assert 'f32[3,2,5' not in text


def test_dropout_changes_training_only(c2i):
  params, weights, a = c2i
  x = _embed(weights, a['ids'][:, :-1], a['labels'])
  cfg = decoder_size('tiny', width=64, layers=2, heads=4, vocab=64)

  def run(deterministic, seed):
    return _forward(
      params,
      x,
      cfg,
      deterministic=deterministic,
      rngs={'dropout': jax.random.key(seed)},
    )[1]

  np.testing.assert_array_equal(run(True, 0), run(True, 1))
  assert np.abs(run(False, 0) - run(False, 1)).max() > 0.1


@pytest.mark.parametrize(
  ('size', 'millions'),
  [
    ('B', 111),
    ('L', 343),
    ('XL', 775),
    ('XXL', 1411),
    ('XXXL', 3900),
    ('1B', 1200),
    ('3B', 3100),
    ('7B', 6600),
  ],
)
def test_named_sizes_have_the_published_parameter_counts(size, millions):
  cfg = decoder_size(size)
  leaves = jax.tree.leaves(names.abstract_decoder(cfg))
  count = sum(int(np.prod(x.shape)) for x in leaves) + 1001 * cfg.width
  digits = 1 if millions < 1000 else 50
  assert abs(count / 1e6 - millions) < digits


def test_var_sizes_have_the_published_parameter_counts():
  for size, millions in (('d16', 310), ('d20', 600), ('d24', 1030)):
    cfg = decoder_size(size)
    leaves = jax.tree.leaves(names.abstract_decoder(cfg))
    count = sum(int(np.prod(x.shape)) for x in leaves)
    count += (1001 + 32 + 1 + 680 + 10 + 1) * cfg.width  # VAR's input tables
    assert abs(count / 1e6 - millions) < 0.02 * millions


def test_fresh_weights_are_small_and_the_head_is_zero():
  cfg = decoder_size('tiny', layers=2)

  def touch(module, x, ids):
    return module.logits(module(x, None, ids)[0]), module.embed(ids)

  init = jax.jit(functools.partial(SetDecoder(cfg).init, method=touch))
  x = jnp.zeros((1, 3, cfg.width))
  params = init(jax.random.key(0), x, jnp.arange(3))['params']
  params = nn.unbox(params)
  assert not np.any(params['head']['kernel'])
  for leaf in (
    params['token']['embedding'],
    params['layers']['attn']['qkv']['kernel'],
    params['layers']['attn']['out']['kernel'],
    params['layers']['ffn']['w2']['kernel'],
  ):
    assert abs(float(leaf.std()) - 0.02) < 5e-4
  first, second = params['layers']['ffn']['w1']['kernel']
  assert np.abs(first - second).max() > 0.01


def test_bfloat16_stays_close_and_gives_float32_logits(c2i):
  params, weights, a = c2i
  x = _embed(weights, a['ids'][:, :-1], a['labels'])
  low = decoder_size(
    'tiny', width=64, layers=2, heads=4, vocab=64, dtype='bfloat16'
  )
  full = _forward(params, x)[0]
  ours, hidden = _forward(params, x, low)
  assert ours.dtype == jnp.float32
  assert hidden.dtype == jnp.bfloat16
  cosine = (ours * full).sum() / jnp.linalg.norm(ours) / jnp.linalg.norm(full)
  assert cosine > 0.999
  assert make_cache(low, 1, 4).k.dtype == jnp.bfloat16


def test_parameters_carry_logical_axes_with_the_layer_axis_first():
  tree = names.abstract_decoder(CFG)
  assert tree['layers']['attn']['qkv']['kernel'].names == (
    *('layers', 'embed', None, 'heads', 'head_dim'),
  )
  assert tree['head']['kernel'].names == ('embed', 'vocab')


def test_a_wrong_state_dict_lists_all_that_is_wrong(c2i):
  _, weights, _ = c2i
  state = dict(weights)
  state['surplus'] = state.pop('norm.weight')
  state['output.weight'] = state['output.weight'][:, :5]
  with pytest.raises(
    ValueError, match=r'1 tensors missing: .*norm\.weight'
  ) as e:
    names.convert_decoder(CFG, state)
  assert "1 unexpected: ['surplus']" in str(e.value)
  assert 'output.weight (64, 5) for head/kernel (64, 64)' in str(e.value)


def test_the_name_table_works_in_reverse(c2i):
  params, weights, _ = c2i
  back = disassemble(names.decoder_table(), params)
  assert set(weights) - set(back) == {'cls_embedding.embedding_table.weight'}
  for name, value in back.items():
    np.testing.assert_array_equal(value, weights[name])
  again = assemble(names.decoder_table(), back, names.abstract_decoder(CFG))
  jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'heads': 5}, r'heads=5 does not divide width=64; accepted: \[1, 2, 4'),
    ({'remat': 'some'}, r"remat='some'; accepted: none, full, dots"),
    ({'block': 'gpt'}, r"block='gpt'; accepted: llama, adaln"),
    ({'attention': 'x'}, r"attention='x'; accepted: auto, xla, splash"),
    ({'layers': 0}, r'layers=0; accepted: 1 or more'),
    ({'drop_path': 1.0}, r'drop_path=1.0; accepted: 0 to below 1'),
  ],
)
def test_impossible_configs_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    decoder_size('tiny', **{'width': 64, **changes})


def test_an_unknown_size_lists_the_known_ones():
  with pytest.raises(
    ValueError, match=r"model.size='M'; accepted: tiny, small"
  ):
    decoder_size('M')


def test_a_condition_vector_belongs_to_the_adaln_block():
  x, ids = jnp.zeros((1, 2, 64)), jnp.arange(2)
  with pytest.raises(ValueError, match=r"block='llama' with cond=given"):
    SetDecoder(CFG).init(jax.random.key(0), x, None, ids, cond=x[:, 0])


@pytest.mark.parametrize(
  ('shared', 'int8'), [(False, False), (True, False), (False, True)]
)
def test_a_condition_worked_out_beforehand_is_the_same(shared, int8):
  cfg = DecoderConfig(
    width=16, layers=2, heads=2, vocab=11, block='adaln', mlp_hidden=16,
    shared_ada=shared,
  )  # fmt: skip
  decoder, ids = SetDecoder(cfg), np.arange(3)
  x = jax.random.normal(jax.random.key(0), (2, 3, 16))
  cond = jax.random.normal(jax.random.key(1), (2, 16))

  def run(params, cond):
    return decoder.apply(params, x, None, ids, cond=cond)[0]

  shapes = jax.eval_shape(
    lambda: decoder.init(jax.random.key(0), x, None, ids, cond=cond)
  )
  params = noisy(unbox(shapes), scale=0.4)
  if int8:  # as `precision.for_sampling` stores it
    ada = params['params']['layers']['ada']
    ada['kernel_scale'] = jnp.full(ada['bias'].shape, 0.01)
    ada['kernel'] = jnp.round(ada['kernel'] / 0.01).astype(jnp.int8)
  want = jax.jit(run)(params, cond)
  known = jax.jit(lambda p: decoder.apply(p, cond, method='modulate'))(params)
  np.testing.assert_allclose(jax.jit(run)(params, known), want, atol=1e-5)
  assert known.ada.shape == (2, 2, 6, 16)
