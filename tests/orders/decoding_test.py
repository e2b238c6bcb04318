"""Each order through a tiny decoder: causality, and cached = full.

The embedding of inputs here is the smallest one that works for all kinds; the
assembled model has its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models.decoder import DecoderConfig, SetDecoder, make_cache
from scar_jax.models.layers import rope_table
from scar_jax.orders import RandomOrder, RasterOrder, ScaleOrder, make_layout
from scar_jax.orders.layout import CONTENT, QUERY, START, VALUE
from scar_jax.types import Array

CFG = DecoderConfig(width=16, layers=2, heads=2, vocab=11, mlp_hidden=16)
BATCH, PREFIX = 2, (1, 2)
ORDERS = {
  'raster': RasterOrder((2, 3)),
  'scale': ScaleOrder((1, 2, 3)),
  'scale, twice whole': ScaleOrder((1, 3, 3)),
  'random': RandomOrder((3, 3), 4),
}


def _random(seed: int, *shape: int) -> Array:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CODES, START_ROW, QUERY_ROW = _random(0, 11, 3), _random(1, 16), _random(2, 16)
WORD = _random(3, 3, 16)


def accumulate(order, k, latent, ids):
  """A toy multi-scale codebook: nearest up and down sampling."""
  side, count = order.side[0], ids.shape[1]
  p = order.patch_nums[k]
  assert count == p * p
  here = jnp.asarray(CODES)[ids].reshape(-1, p, p, 3)
  up = np.arange(side) * p // side
  latent = (0 if latent is None else latent) + here[:, up][:, :, up]
  if k + 1 == len(order.patch_nums):
    return latent, None
  q = order.patch_nums[k + 1]
  down = np.arange(q) * side // q
  return latent, latent[:, down][:, :, down].reshape(-1, q * q, 3)


@pytest.fixture(scope='module')
def params():
  """Random weights, the head included, so that logits are varied."""

  def touch(module, x, ids):
    return module.logits(module(x, None, ids)[0]), module.embed(ids)

  init = functools.partial(SetDecoder(CFG).init, method=touch)
  x = jnp.zeros((1, 2, 16))
  tree = jax.eval_shape(init, jax.random.key(0), x, jnp.arange(2))['params']
  leaves, treedef = jax.tree.flatten(tree)
  values = [0.3 * _random(i, *x.shape) for i, x in enumerate(leaves)]
  return jax.tree.unflatten(treedef, values)


class Model:
  """Embeds inputs by kind and runs the decoder."""

  def __init__(self, params, order, prefix_mask='bidirectional', prefix=PREFIX):
    self.params, self.order = {'params': params}, order
    self.layout = make_layout(order, prefix, 1, prefix_mask)
    self.set0 = _random(7, BATCH, self.layout.set0_len, 16)
    self.add = functools.partial(accumulate, order)

  def embed(self, inputs):
    kinds = np.array(inputs.kind)[:, None]
    apply = functools.partial(SetDecoder(CFG).apply, self.params)
    x = apply(jnp.maximum(inputs.tokens, 0), method='embed')
    x = jnp.where(kinds == QUERY, QUERY_ROW, x)
    x = jnp.where(kinds == START, START_ROW, x)
    if VALUE in inputs.kind:
      x = jnp.where(kinds == VALUE, inputs.values @ WORD, x)
    return x

  def rope(self, positions, zero=None):
    return rope_table(jnp.asarray(positions), CFG.head_dim, zero_rows=zero)

  def run(self, x, rope, ids, cache=None):
    apply = functools.partial(SetDecoder(CFG).apply, self.params)
    hidden, cache = apply(x, rope, jnp.asarray(ids), cache)
    return apply(hidden, method='logits'), cache

  def full(self, inputs, x=None):
    """Logits of all targets, in target order."""
    x = self.embed(inputs) if x is None else x
    layout, positions = self.layout, self.layout.target_positions(inputs)
    start = layout.positions
    if positions.ndim == 3:
      start = np.broadcast_to(start, (BATCH, *start.shape))
    zero = np.pad(layout.zero_rope, (0, layout.target_len))
    rope = self.rope(jnp.concatenate([start, positions], axis=-2), zero)
    x = jnp.concatenate([self.set0, x], axis=1)
    return self.run(x, rope, layout.set_ids)[0][:, layout.logit_index]


def _case(order):
  tokens = np.random.default_rng(5).integers(0, 11, (BATCH, order.num_targets))
  keys = jax.random.split(jax.random.key(1), BATCH)
  state = order.start(BATCH, keys)
  return jnp.asarray(tokens, jnp.int32), state


# Without a prefix set 0 is one token, and there is one mask.
@pytest.mark.parametrize('name', ORDERS)
@pytest.mark.parametrize(
  ('prefix_mask', 'prefix'),
  [('bidirectional', PREFIX), ('causal', PREFIX), ('bidirectional', None)],
)
def test_cached_decoding_by_sets_equals_the_full_pass(
  params, name, prefix_mask, prefix
):
  order = ORDERS[name]
  model = Model(params, order, prefix_mask, prefix)
  tokens, state = _case(order)

  @jax.jit
  def run(tokens, state):
    full = model.full(order.train_inputs(tokens, state.perm, model.add))
    targets = order.targets(tokens, state.perm)
    layout = model.layout
    cache = make_cache(CFG, BATCH, layout.length + 3)
    ids = layout.set_ids[: layout.set0_len]
    rope = model.rope(layout.positions, layout.zero_rope)
    logits, cache = model.run(model.set0, rope, ids, cache)
    parts, first = [], 0
    for k, size in enumerate(order.set_sizes):
      step = order.step_inputs(state, k)
      if step is not None:
        rope = model.rope(layout.target_positions(step))
        logits, cache = model.run(model.embed(step), rope, step.set_ids, cache)
      parts.append(logits[:, -size:])
      forced = targets[:, first : first + size]
      state = order.write(state, k, forced, model.add)
      first += size
    return full, jnp.concatenate(parts, axis=1), state, cache.length

  full, ours, state, length = run(tokens, state)
  assert ours.shape == (BATCH, order.num_targets, 11)
  np.testing.assert_allclose(ours, full, atol=1e-4)
  np.testing.assert_array_equal(order.tokens(state), tokens)
  assert int(length) == model.layout.length
  assert np.abs(full).max() > 0.5


@pytest.mark.parametrize('name', ORDERS)
def test_logits_of_a_set_depend_on_earlier_sets_only(params, name):
  order = ORDERS[name]
  model = Model(params, order)
  tokens, state = _case(order)
  set_of = np.repeat(np.arange(len(order.set_sizes)), order.set_sizes)
  targets = order.targets(tokens, state.perm)
  run = jax.jit(
    lambda t: model.full(order.train_inputs(t, state.perm, model.add))
  )
  base = run(tokens)
  for n in range(order.num_targets):
    changed = targets.at[:, n].set((targets[:, n] + 4) % 11)
    raw = order.tokens(state.replace(tokens=changed))
    moved = np.abs(run(raw) - base).max((0, 2)) > 1e-7
    assert not moved[set_of <= set_of[n]].any()
    assert moved[set_of > set_of[n]].all()


@pytest.mark.parametrize('name', ORDERS)
def test_set_zero_has_no_gradient_from_the_target(params, name):
  order = ORDERS[name]
  model = Model(params, order)
  tokens, state = _case(order)
  inputs = order.train_inputs(tokens, state.perm, model.add)
  layout = model.layout
  positions = np.zeros((layout.length, 2), np.float32)

  def hidden(x, place):
    x = jnp.concatenate([model.set0, x], axis=1)
    rope = model.rope(positions)
    return (model.run(x, rope, layout.set_ids)[0][:, place] ** 2).sum()

  grad = jax.jit(jax.grad(hidden))
  x = model.embed(inputs)
  for place in range(layout.set0_len):
    assert not np.any(grad(x, place))
  assert np.abs(grad(x, layout.length - 1)).max() > 1e-6


def test_raster_steps_take_a_traced_number():
  order = ORDERS['raster']
  tokens, state = _case(order)
  state = state.replace(tokens=tokens)
  full = order.train_inputs(tokens)
  step = jax.jit(lambda k: order.step_inputs(state, k))
  for k in range(1, order.num_targets):
    ours = step(k)
    assert ours.tokens.tolist() == full.tokens[:, k - 1 : k].tolist()
    assert ours.positions.tolist() == full.positions[k - 1 : k].tolist()
    assert ours.set_ids.tolist() == [k] == [full.set_ids[k - 1]]
  assert order.step_inputs(state, 0) is None


def test_scale_training_inputs_are_those_of_the_sampler():
  order = ORDERS['scale']
  add = functools.partial(accumulate, order)
  tokens, state = _case(order)
  full = order.train_inputs(tokens, None, add)
  assert full.values.shape == (BATCH, 14, 3)
  assert not full.values[:, 0].any()
  first = 0
  for k, size in enumerate(order.set_sizes):
    step = order.step_inputs(state, k)
    here = slice(first, first + size)
    if k:
      np.testing.assert_array_equal(step.values, full.values[:, here])
    assert step.kind == full.kind[here]
    assert step.level == full.level[here] == (k,) * size
    np.testing.assert_array_equal(step.positions, full.positions[here])
    state = order.write(state, k, tokens[:, here], add)
    first += size
  with pytest.raises(ValueError, match='got accumulate=None'):
    order.train_inputs(tokens)


def test_scale_positions_are_cell_centres_on_the_last_grid():
  positions = (
    ScaleOrder((1, 2, 4))
    .train_inputs(
      jnp.zeros((1, 21), jnp.int32),
      None,
      lambda k, latent, ids: (None, jnp.zeros((1, (4, 16, 0)[k], 3))),
    )
    .positions
  )
  assert positions[0].tolist() == [1.5, 1.5]
  assert positions[1:5, 1].tolist() == [0.5, 2.5, 0.5, 2.5]
  assert positions[5:10, 1].tolist() == [0, 1, 2, 3, 0]


def test_a_permutation_depends_on_its_own_key_only():
  order = ORDERS['random']
  keys = jax.random.split(jax.random.key(9), 4)
  all_rows = order.start(4, keys).perm
  one = order.start(1, keys[2:3]).perm
  assert all_rows[2].tolist() == one[0].tolist()
  assert sorted(one[0].tolist()) == list(range(9))
  assert all_rows[0].tolist() != all_rows[1].tolist()


def test_random_inputs_put_each_query_at_its_cell():
  order = RandomOrder((2, 2), 2)
  tokens = jnp.array([[10, 11, 12, 13]])
  perm = jnp.array([[3, 0, 1, 2]])
  inputs = order.train_inputs(tokens, perm)
  assert inputs.tokens.tolist() == [[-1, -1, 13, 10, -1, -1]]
  assert inputs.kind == (QUERY, QUERY, CONTENT, CONTENT, QUERY, QUERY)
  cells = [[1, 1], [0, 0], [1, 1], [0, 0], [0, 1], [1, 0]]
  assert inputs.positions[0].tolist() == cells
  assert order.targets(tokens, perm).tolist() == [[13, 10, 11, 12]]
