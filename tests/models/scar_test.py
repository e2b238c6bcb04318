import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy, tiny_config, with_features

from scar_jax import objectives
from scar_jax.models.conditions import drop_conditions, empty_conditions
from scar_jax.models.encoders.t5 import t5_config
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar import Scar
from scar_jax.models.text_embedder import TextCondition


@functools.cache
def _run(cfg):
  """The compiled forward pass; op by op would compile far more."""
  return jax.jit(Scar(cfg).apply, static_argnames=('deterministic',))


def test_drop_schemes():
  draws = jnp.array([0.0, 0.04, 0.07, 0.2, 0.94, 0.96])
  text, prefix = drop_conditions(draws, 'joint', 0.1, 0.1)
  assert text.tolist() == [True, True, False, False, False, True]
  assert prefix.tolist() == [True, True, True, False, False, False]
  text, prefix = drop_conditions(draws, 'text', 0.1, 0.1)
  assert text.tolist() == [True, True, True, False, False, False]
  assert not prefix.any()


def test_a_row_without_text_is_the_null_condition():
  text = TextCondition(kind='t5', length=3, width=5, mask_pad=True)
  cfg, params, _, cond = _tiny(tiny_config(text=text))
  bound = Scar(cfg).bind({'params': params})
  null, mask = jnp.array([False, True]), jnp.ones((2, 3), bool)
  by_flag, _ = bound.text.text(cond.text, mask, null)
  by_mask, seen = bound.text.text(cond.text, mask & ~null[:, None], ~mask[:, 0])
  np.testing.assert_array_equal(by_mask, by_flag)
  assert seen.all()


@pytest.fixture(scope='module')
def tiny():
  return _tiny(tiny_config())


def _tiny(cfg, seed=0):
  tokens = jnp.arange(2 * cfg.grid[0] * cfg.grid[1]) % cfg.decoder.vocab
  tokens = tokens.reshape(2, -1)
  rngs = {'params': jax.random.key(seed), 'order': jax.random.key(1)}
  cond = empty_conditions(cfg, 2)
  shapes = jax.eval_shape(Scar(cfg).init, rngs, tokens, cond)['params']
  return cfg, noisy(nn.unbox(shapes)), tokens, with_features(cond, 3)


def _grad_of(term, cfg, params, tokens, cond, stop=False):
  target = 2 * cond.features[::-1]

  def loss_fn(params, features, target):
    out = _run(cfg)(
      {'params': params}, tokens, cond.replace(features=features), target
    )
    if term == 'pres':
      return objectives.preservation(out.restored, features)
    return objectives.alignment(out.hidden_prefix, out.align_target, stop)[0]

  return jax.jit(jax.grad(loss_fn, (0, 1, 2)))(params, cond.features, target)


def _reached(grads):
  flat = jax.tree_util.tree_leaves_with_path(grads)
  return {
    '/'.join(str(k.key) for k in path) for path, g in flat if np.any(g != 0)
  }


def test_preservation_reaches_compressor_and_restorer_only(tiny):
  params, features, target = _grad_of('pres', *tiny)
  parts = {name.rsplit('/', 1)[0] for name in _reached(params)}
  assert parts == {
    'prefix/compress/conv0',
    'prefix/restore/conv_in',
    'prefix/restore/conv_out',
  }
  assert not np.any(features)  # the encoder is frozen
  assert not np.any(target)


def test_alignment_reaches_all_but_restorer_targets_and_head(tiny):
  params, features, target = _grad_of('align', *tiny)
  reached = _reached(params)
  assert {'prefix/compress/conv0/kernel', 'prefix/proj/kernel'} <= reached
  assert {'text/fc1/kernel', 'decoder/layers/attn/qkv/kernel'} <= reached
  assert not any('restore' in name for name in reached)
  # The prefix never sees a target token: exactly zero.
  assert not np.any(params['decoder']['token']['embedding'])
  assert not np.any(params['decoder']['head']['kernel'])
  assert not np.any(features)
  assert not np.any(target)


def test_stopped_target_changes_the_projection_gradient_only_through_it(tiny):
  flows, _, _ = _grad_of('align', *tiny)
  stopped, _, _ = _grad_of('align', *tiny, stop=True)
  layer = ('decoder', 'layers', 'ffn', 'w2', 'kernel')
  a, b = flows, stopped
  for key in layer:
    a, b = a[key], b[key]
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  kernel = [g['prefix']['proj']['kernel'] for g in (flows, stopped)]
  assert np.abs(kernel[0] - kernel[1]).max() > 1e-3
  assert np.any(kernel[1])


def test_prefix_reads_the_text_only_under_the_papers_mask():
  for mask, reads in (('bidirectional', True), ('causal', False)):
    cfg, params, tokens, cond = _tiny(tiny_config(prefix_mask=mask))

    def states(text, cfg=cfg, params=params, tokens=tokens, cond=cond):
      changed = cond.replace(text=text)
      out = _run(cfg)({'params': params}, tokens, changed)
      return out.hidden_prefix

    changed = states(cond.text + 1.0) - states(cond.text)
    assert bool(np.any(changed != 0)) == reads, mask


def test_hidden_padding_changes_nothing():
  text = TextCondition(kind='t5', length=3, width=5, mask_pad=True)
  cfg, params, tokens, cond = _tiny(tiny_config(text=text))
  mask = jnp.array([[True, True, False], [True, False, False]])
  cond = cond.replace(text_mask=mask)
  other = cond.replace(text=jnp.where(mask[..., None], cond.text, 7.0))
  run = _run(cfg)
  first = run({'params': params}, tokens, cond)
  second = run({'params': params}, tokens, other)
  # The last text position predicts token 0 and always sees itself.
  np.testing.assert_array_equal(first.logits[:, 1:], second.logits[:, 1:])
  np.testing.assert_array_equal(first.hidden_prefix, second.hidden_prefix)


def test_pre_norm_alignment_is_standardised_on_both_sides():
  cfg, params, tokens, cond = _tiny(tiny_config(align_hidden='pre_norm'))
  out = _run(cfg)({'params': params}, tokens, cond, cond.features)
  for x in (out.hidden_prefix, out.align_target):
    np.testing.assert_allclose(np.std(x, -1), 1, atol=1e-3)
  assert np.abs(out.hidden_prefix - out.hidden[:, :4]).max() > 1e-3


@pytest.mark.parametrize('compress', ['unshuffle', 'none', 'vq', 'vq_pool'])
def test_prefix_variants_run(compress):
  width = 16 if compress.startswith('vq') else 6
  prefix = PrefixConfig(compress, grid=(4, 4), width=width, out=16)
  cfg, params, tokens, cond = _tiny(tiny_config(prefix=prefix))
  target = cond.features
  out = _run(cfg)({'params': params}, tokens, cond, target)
  length = 4 if compress in ('unshuffle', 'vq_pool') else 16
  assert out.hidden.shape == (2, length + 3 + 5, 16)
  assert out.logits.shape == (2, 6, 11)
  assert out.restored is None
  assert (out.align_target is None) == compress.startswith('vq')


@pytest.mark.parametrize('kind', ['byte', 'none', 'label'])
def test_text_kinds_run(kind):
  encoder = t5_config('byte', width=8, heads=2, head_dim=4, ffn=8, layers=1)
  text = TextCondition(
    kind, length=3, classes=4, encoder=encoder if kind == 'byte' else None
  )
  cfg, params, tokens, cond = _tiny(tiny_config(text=text))
  if kind == 'byte':
    # An empty row is finite, the null condition, and trains nothing of itself.
    mask = jnp.array([[True, True, False], [False] * 3])
    cond = cond.replace(text_mask=mask, text=jnp.array([[5, 1, 0], [0, 0, 0]]))
  out = _run(cfg)({'params': params}, tokens, cond)
  positions = {'byte': 3, 'none': 0, 'label': 1}[kind]
  assert out.hidden.shape[1] == 4 + positions + 5
  assert np.isfinite(out.logits).all()
  if kind == 'byte':
    null = cond.replace(null_text=jnp.array([False, True]))
    same = _run(cfg)({'params': params}, tokens, null)
    np.testing.assert_array_equal(out.logits, same.logits)
    total = jax.grad(
      lambda p: jnp.sum(_run(cfg)({'params': p}, tokens, cond).logits)
    )
    grads = jax.jit(total)(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_text_token_dropout_spares_the_prefix_and_scope_all_adds_targets():
  for scope in ('text', 'all'):
    cfg = tiny_config(token_dropout=0.5, token_dropout_scope=scope)
    cfg = dataclasses.replace(
      cfg,
      text_dropout=0.0,
      decoder=dataclasses.replace(
        cfg.decoder, resid_dropout=0.0, ffn_dropout=0.0
      ),
      prefix_mask='causal',
    )
    cfg, params, tokens, cond = _tiny(cfg)
    rngs = {'dropout': jax.random.key(0), 'condition': jax.random.key(1)}
    run = _run(cfg)
    out = run({'params': params}, tokens, cond, deterministic=False, rngs=rngs)
    still = run({'params': params}, tokens, cond)
    np.testing.assert_allclose(out.hidden_prefix, still.hidden_prefix)
    assert np.abs(out.hidden[:, 4:7] - still.hidden[:, 4:7]).max() > 1e-3


def test_null_constants_have_no_gradient():
  cfg, params, tokens, cond = _tiny(
    tiny_config(
      cond_dropout='joint',
      text=TextCondition(kind='t5', length=3, width=5, null='fixed'),
    )
  )
  cond = cond.replace(
    null_text=jnp.ones(2, bool), null_prefix=jnp.ones(2, bool)
  )
  total = jax.grad(
    lambda p: jnp.sum(_run(cfg)({'params': p}, tokens, cond).logits ** 2)
  )
  grads = jax.jit(total)(params)
  assert not np.any(grads['text']['null_text'])
  assert np.any(grads['null_prefix'])  # learned: ours


def test_impossible_models_are_errors():
  with pytest.raises(ValueError, match=r"order='spiral'; accepted: raster, "):
    tiny_config(order='spiral')
  with pytest.raises(ValueError, match=r'prefix\.out=64; accepted: .* 16'):
    tiny_config(prefix=PrefixConfig(out=64))
  off = PrefixConfig('off', out=16)
  with pytest.raises(ValueError, match="cond_dropout='joint' without a prefix"):
    tiny_config(prefix=off, cond_dropout='joint')
  with pytest.raises(ValueError, match='has nothing to start from'):
    tiny_config(prefix=off, text=TextCondition(kind='none'))
  with pytest.raises(
    ValueError, match=r"text\.kind='clip'; accepted: none, la"
  ):
    TextCondition(kind='clip')
  cfg, params, tokens, cond = _tiny(tiny_config())
  with pytest.raises(ValueError, match=r'needs conditions\.features'):
    _run(cfg)({'params': params}, tokens, cond.replace(features=None))
  with pytest.raises(ValueError, match='null prefixes asked from a model'):
    _run(cfg)(
      {'params': params}, tokens, cond.replace(null_prefix=jnp.ones(2, bool))
    )
