"""The injection baselines: who reads what, in every order, cached and not.

Tolerance: cached and teacher-forced logits agree to 1e-4 in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy, tiny_config, tiny_model
from scar_setup import frozen_artifacts, scar_batch, scar_config

from scar_jax.convert import editar
from scar_jax.filters import SamplerConfig
from scar_jax.models.inject import depths, read_by
from scar_jax.models.prefill import PrefixConfig
from scar_jax.orders import RandomOrder, RasterOrder
from scar_jax.sampling import Sampler, generate
from scar_jax.sampling_loop import stack_branches
from scar_jax.sharding import logical_axes, unbox
from scar_jax.train.tasks import make_task

KINDS = ('fusion', 'cross')
ORDERS = ('raster', 'random', 'scale')


def _config(inject, order='raster', **fields):
  small = dict(
    order__name=order, order__num_sets=2, prefix__inject=inject, prefix__k=1,
    loss__align=0.0, model__layers=3, model__cond_dropout='joint',
  )  # fmt: skip
  return scar_config(**(small | fields))


@functools.cache
def _made(inject, order):
  """Task, parameters, conditions, and logits of a teacher-forced pass."""
  task = make_task(_config(inject, order), frozen_artifacts(order))
  batch = scar_batch()
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  params = {'params': noisy(unbox(shapes['params']), scale=0.5)}
  cond, _ = jax.jit(task.parts.conditions)(task.frozen, batch)
  add = task.parts.accumulate(task.frozen)
  model = task.model

  @jax.jit
  def logits(tokens, cond, perm):
    both = stack_branches(cond, 'image_text')
    tokens = jnp.concatenate([tokens] * 3)
    perm = None if perm is None else jnp.concatenate([perm] * 3)
    out = model.apply(params, tokens, both, perm=perm, accumulate=add)
    return out.logits.reshape(3, 2, *out.logits.shape[1:])

  return task, params, cond, logits


@functools.cache
def _sampled(inject, order):
  task, params, cond, _ = _made(inject, order)
  sampler = Sampler(task.model, SamplerConfig(guidance_mode='image_text'))
  add = task.parts.accumulate(task.frozen)
  return sampler.run(params, cond, [5, 6], 2.0, 1.5, trace=True, accumulate=add)


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('inject', KINDS)
def test_cached_sampling_is_teacher_forcing(inject, order):
  task, _, cond, logits = _made(inject, order)
  out = _sampled(inject, order)
  full = logits(out.tokens, cond, out.perm)
  assert np.abs(full).max() > 0.5
  np.testing.assert_allclose(out.raw, full, rtol=1e-4, atol=1e-4)
  layout = task.model.cfg.make_layout()
  assert (layout.prefix_len, layout.set0_len) == (0, 4)
  # The null condition is another one.
  assert np.all(np.ptp(full[1:], axis=0).max(-1) > 1e-3)


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('inject', KINDS)
def test_logits_see_all_of_the_condition_and_no_later_set(inject, order):
  task, _, cond, logits = _made(inject, order)
  out = _sampled(inject, order)
  sizes = task.model.cfg.make_order().set_sizes
  set_of = np.repeat(np.arange(len(sizes)), sizes)
  base = logits(out.tokens, cond, out.perm)
  for n in range(len(set_of)):
    at = (slice(None), n)
    if out.perm is not None:
      at = (jnp.arange(2), out.perm[:, n])
    tokens = out.tokens.at[at].add(5) % 16
    moved = np.abs(logits(tokens, cond, out.perm) - base).max((0, 1, 3))
    assert not np.any(moved[set_of <= set_of[n]] > 1e-6)
    assert np.all(moved[set_of > set_of[n]] > 1e-5)
  other = cond.replace(features=cond.features[::-1])
  moved = np.abs(logits(out.tokens, other, out.perm) - base).max(-1)
  assert np.all(moved[:2] > 1e-4)  # with and without text
  assert not np.any(moved[2] > 1e-6)  # the null condition


def test_copies_of_a_request_share_what_is_injected():
  task, params, cond, _ = _made('fusion', 'raster')
  cfg = SamplerConfig(guidance_mode='image_text')
  scales = jnp.asarray([2.0, 1.5, 1.0])
  run = jax.jit(
    lambda cond, seeds, copies: generate(
      task.model, params, cond, seeds, scales, cfg, trace=True, copies=copies
    ),
    static_argnums=2,
  )
  seeds = jnp.asarray([5, 8, 6, 9], jnp.uint32)
  out = run(cond, seeds, 2)
  alone = _sampled('fusion', 'raster')
  np.testing.assert_array_equal(out.tokens[::2], alone.tokens)
  np.testing.assert_allclose(out.raw[:, ::2], alone.raw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('order', ORDERS)
def test_cross_attention_knows_where_a_feature_lies(order):
  *_, cond, logits = _made('cross', order)
  out = _sampled('cross', order)
  base = logits(out.tokens, cond, out.perm)
  turned = cond.replace(features=jnp.roll(cond.features, 1, axis=1))
  moved = np.abs(logits(out.tokens, turned, out.perm) - base).max(-1)
  assert np.all(moved[:2] > 1e-4)


def test_contents_of_the_random_order_predict_nothing():
  order = RandomOrder((2, 2), 2)
  perm = jnp.array([[3, 0, 1, 2]])
  inputs = order.train_inputs(jnp.array([[10, 11, 12, 13]]), perm)
  read = read_by(order, 2, slice(None), inputs)
  assert read.tolist() == [[-1, -1, 3, 0, -1, -1, 1, 2]]
  order = RasterOrder((2, 2))
  inputs = order.train_inputs(jnp.array([[10, 11, 12, 13]]))
  assert read_by(order, 2, slice(1, 2), inputs).tolist() == [0, 1, 2, 3]


def _alone(params):
  """The blocks' own branches off: every position sees only itself."""
  for name in ('attn', 'ffn'):
    part = params['params']['decoder']['layers'][name]
    last = part['out' if name == 'attn' else 'w2']
    last['kernel'] = jnp.zeros_like(last['kernel'])
  return params


@pytest.mark.parametrize('order', ['raster', 'random'])
def test_fusion_gives_each_prediction_the_feature_of_its_place(order):
  prefix = PrefixConfig(
    compress='none', grid=(2, 3), width=6, out=16, inject='fusion'
  )
  cfg = tiny_config(order=order, num_sets=2, prefix=prefix)
  model, params, cond = tiny_model(cfg)
  params = _alone(params)
  tokens, perm = jnp.arange(18).reshape(3, 6) % 11, None
  if order == 'random':
    perm = cfg.make_order().draw(jax.random.split(jax.random.key(3), 3))
  run = jax.jit(lambda c: model.apply(params, tokens, c, perm=perm).hidden)
  base, layout = run(cond), cfg.make_layout()
  cells = np.arange(6)[None].repeat(3, 0) if perm is None else perm
  for cell in range(6):
    features = cond.features.at[:, cell // 3, cell % 3].add(1.0)
    moved = np.abs(run(cond.replace(features=features)) - base).max(-1) > 1e-6
    expected = np.zeros((3, layout.length), bool)
    expected[:, layout.logit_index] = cells == cell
    np.testing.assert_array_equal(moved, expected)


def test_the_injection_reads_at_three_depths():
  assert depths(24) == (0, 8, 16)
  assert depths(22) == (0, 7, 14)
  assert depths(1) == (0,)
  task, params, cond, _ = _made('fusion', 'raster')
  tokens = jnp.zeros((2, 4), jnp.int32)
  run = jax.jit(lambda p: task.model.apply(p, tokens, cond).logits)
  base = run(params)
  for slot in range(3):
    other = jax.tree.map(lambda x: x, params)
    fc2 = other['params']['inject']['mlp']['fc2']
    fc2['kernel'] = fc2['kernel'].at[slot].set(0.0)
    assert np.abs(run(other) - base).max() > 1e-3


@pytest.mark.parametrize('inject', KINDS)
def test_parameters_are_placed_like_those_of_the_blocks(inject):
  task = _made(inject, 'raster')[0]
  shapes = jax.eval_shape(task.init, jax.random.key(0), scar_batch())
  axes = logical_axes(shapes['params'])['inject']
  heads = ('heads', 'head_dim')
  assert (
    axes
    == {
      'fusion': {
        'mlp': {
          'fc1': {'kernel': ('layers', 'embed', 'mlp')},
          'fc2': {'kernel': ('layers', 'mlp', 'embed')},
        }
      },
      'cross': {
        'kv': {'kernel': ('layers', 'embed', None, *heads)},
        'q': {'kernel': ('layers', 'embed', *heads)},
        'out': {'kernel': ('layers', *heads, 'embed')},
      },
    }[inject]
  )


def test_cross_attention_takes_compressed_features_and_their_restorer():
  fields = dict(prefix__k=2, model__cond_dropout='text', model__remat='full')
  task = make_task(_config('cross', **fields), frozen_artifacts())
  batch = scar_batch()
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  params = noisy(unbox(shapes['params']))

  @jax.jit
  def grads(params):
    def loss(p):
      return task.loss(p, {}, task.frozen, batch, jax.random.key(0), True)

    return jax.grad(loss, has_aux=True)(params)

  found, (metrics, _) = grads(params)
  assert {'ce', 'pres'} <= set(metrics)
  assert not task.model.cfg.aligns
  for part in (found['inject'], found['prefix']):
    assert all(np.any(g != 0) for g in jax.tree.leaves(part))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'loss__align': 0.5}, r"align=0\.5 with prefix\.inject='fusion'.*pted: 0"),
    ({'prefix__k': 2}, r"'fusion' with prefix\.compress='full' and k=2: .*k=1"),
    ({'prefix__compress': 'off'}, r"'fusion' with prefix\.compress='off'"),
    ({'text__kind': 'none'}, r'nothing to start from.*prefix\.inject'),
    ({'prefix__inject': 'film'}, r"prefix\.inject='film'; accepted: prefill, "),
  ],
)
def test_what_cannot_be_injected_is_told(fields, message):
  with pytest.raises(ValueError, match=message):
    make_task(_config('fusion', **fields), frozen_artifacts())


def test_public_checkpoints_have_no_injection():
  with pytest.raises(ValueError, match="'cross' has no counterpart in a"):
    editar.table(_made('cross', 'raster')[0].model.cfg)
