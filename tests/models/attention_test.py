"""The attention call against numpy, and the cache's bookkeeping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models.attention import (
  UNWRITTEN,
  attend,
  attend_slots,
  cache_mask,
  empty_cache,
  write_layer,
)


def _qkv(lq=3, s=4):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(2, n, 2, 4) for n in (lq, s, s)]
  pairs = zip(keys, shapes, strict=True)
  return [jax.random.normal(k, shape) for k, shape in pairs]


def test_attention_equals_numpy_under_a_mask():
  q, k, v = _qkv()
  mask = np.array([[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1]], bool)
  ours = attend(q, k, v, mask[None])
  for b in range(2):
    for h in range(2):
      logits = np.asarray(q[b, :, h]) @ np.asarray(k[b, :, h]).T / 2
      weights = np.exp(logits) * mask
      weights /= weights.sum(-1, keepdims=True)
      expected = weights @ np.asarray(v[b, :, h])
      np.testing.assert_allclose(ours[b, :, h], expected, atol=1e-6)


def test_a_hidden_key_gives_exactly_nothing():
  q, k, v = _qkv()
  mask = np.ones((2, 3, 4), bool)
  mask[0, :, 2] = False
  ours = attend(q, k, v, mask)
  other = attend(q, k, v.at[:, 2].add(100.0), mask)
  np.testing.assert_array_equal(ours[0], other[0])
  assert np.abs(ours[1] - other[1]).max() > 1


@pytest.mark.parametrize(
  ('dtype', 'atol'), [('float32', 1e-5), ('bfloat16', 0.06)]
)
def test_gradients_on_cpus_equal_those_of_the_plain_formula(dtype, atol):
  q, k, v = _qkv()
  mask = np.array([[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]], bool)[None]
  wanted = jax.random.normal(jax.random.key(1), q.shape)

  def plain(q, k, v):
    logits = jnp.einsum('blhk,bshk->bhls', q, k) * 0.3
    logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    out = jnp.einsum('bhls,bshk->blhk', jax.nn.softmax(logits, -1), v)
    return jnp.sum(out * wanted)

  def ours(q, k, v):
    out = attend(*(x.astype(dtype) for x in (q, k, v)), mask, 0.3)
    return jnp.sum(out.astype(jnp.float32) * wanted)

  expected, found = (jax.grad(f, (0, 1, 2))(q, k, v) for f in (plain, ours))
  for e, f in zip(expected, found, strict=True):
    np.testing.assert_allclose(e, f, atol=atol)
  assert all(np.abs(e).max() > 0.1 for e in expected)


@pytest.mark.parametrize('block', [1, 2, 5, 6])
def test_blocks_of_queries_change_nothing(block):
  q, k, v = _qkv(5, 7)
  mask = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 5, 7))
  mask = mask.at[:, :, 0].set(True)
  whole = attend(q, k, v, mask, 0.3)
  k, v = (x.transpose(0, 2, 3, 1) for x in (k, v))  # as a cache holds them
  run = functools.partial(attend_slots, k=k, v=v, scale=0.3, block=block)
  np.testing.assert_allclose(run(q, mask=mask), whole, atol=1e-6)
  one_mask = run(q, mask=mask[:1])
  np.testing.assert_allclose(one_mask[0], whole[0], atol=1e-6)
  text = str(jax.make_jaxpr(lambda q: run(q, mask=mask))(q))
  assert f'f32[2,2,{min(block, 5)},7]' in text
  assert ('f32[2,2,5,7]' in text) == (block >= 5)


def test_blocks_of_queries_are_equal():
  q, k, v = (x.transpose(0, 2, 3, 1) for x in _qkv(40, 40))
  q = q.transpose(0, 3, 1, 2)
  mask = np.ones((1, 40, 40), bool)
  call = functools.partial(attend_slots, scale=0.3, block=36)
  text = str(jax.make_jaxpr(call)(q, k, v, mask))
  assert 'f32[2,2,24,40]' in text  # 40 queries as 2 x 24, not 2 x 36
  assert 'f32[2,2,36,40]' not in text


def test_no_attention_weights_are_kept_for_the_backward_pass():
  q, k, v = _qkv(5, 7)
  mask = np.ones((1, 5, 7), bool)
  _, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
  kept = [x.shape for x in jax.tree.leaves(back)]
  assert kept
  assert (2, 2, 5, 7) not in kept


def test_softmax_is_float32_in_bfloat16():
  q, k, v = (x.astype(jnp.bfloat16) for x in _qkv())
  ours = attend(q, k, v, np.ones((1, 3, 4), bool))
  assert ours.dtype == jnp.bfloat16
  text = str(jax.make_jaxpr(attend)(q, k, v, np.ones((1, 3, 4), bool)))
  exps = [line for line in text.splitlines() if ' exp ' in line]
  assert exps
  assert all('f32[' in line for line in exps)


def test_attention_dropout_needs_a_key():
  q, k, v = _qkv()
  mask = np.ones((1, 3, 4), bool)
  plain = attend(q, k, v, mask)
  np.testing.assert_array_equal(attend(q, k, v, mask, dropout=0.5), plain)
  dropped = attend(q, k, v, mask, dropout=0.5, rng=jax.random.key(0))
  assert np.abs(dropped - plain).max() > 0.01


def test_unwritten_slots_are_never_seen():
  cache = empty_cache(1, 2, 6, 2, 4, 'float32')
  assert cache.set_ids.tolist() == [UNWRITTEN] * 6
  valid = jnp.array([[True, False], [True, True]])
  mask, cache = cache_mask(cache, jnp.array([0, 0]), valid)
  assert mask.shape == (2, 2, 6)
  expected = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
  assert np.asarray(mask[0], int).tolist() == expected
  assert np.asarray(mask[1], int).tolist() == [[1, 1, 0, 0, 0, 0]] * 2
  mask, cache = cache_mask(cache, jnp.array([2, 1]), None)
  # The masked key stays hidden, set 1 does not see set 2.
  expected = [[1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 0, 0]]
  assert np.asarray(mask[0], int).tolist() == expected
  assert int(cache.length) == 4
  assert cache.set_ids.tolist() == [0, 0, 2, 1, UNWRITTEN, UNWRITTEN]


def test_a_layer_writes_its_own_slots_only():
  cache = jnp.zeros((3, 1, 1, 1, 4))
  new = jnp.array([[[[5.0]], [[6.0]]]])
  cache, layer = write_layer(cache, new, jnp.int32(1), jnp.int32(2))
  assert layer[0, 0, 0].tolist() == [0, 0, 5, 6]
  assert cache[:, 0, 0, 0].tolist() == [[0] * 4, [0, 0, 5, 6], [0] * 4]


def test_more_positions_than_slots_are_refused():
  cache = empty_cache(1, 1, 2, 1, 4, 'float32')
  with pytest.raises(ValueError, match=r'3 new positions .* cache of 2 slots'):
    cache_mask(cache, jnp.arange(3), None)


@pytest.mark.parametrize('used', [3, None])
def test_a_layer_is_one_slice_of_the_cache(used):
  # A slice of a slice is a copy of the layer on TPUs, in every step.
  cache = jnp.arange(2 * 2 * 5 * 1 * 4, dtype=jnp.float32).reshape(
    2, 2, 1, 4, 5
  )
  new = -jnp.ones((2, 1, 1, 4))

  def write(cache, layer, at):
    return write_layer(cache, new, layer, at, used)

  made, layer = write(cache, jnp.int32(1), jnp.int32(2))
  np.testing.assert_array_equal(layer, made[1, ..., :used])
  text = str(jax.make_jaxpr(write)(cache, jnp.int32(1), jnp.int32(2)))
  assert text.count('dynamic_slice[') == 1
  assert ' slice[' not in text


def test_first_slots_are_not_read_back():
  new = jnp.arange(24.0).reshape(2, 3, 1, 4)
  write = functools.partial(write_layer, new=new, used=3)
  args = jnp.zeros((2, 2, 1, 4, 5)), jnp.int32(1), jnp.int32(0)
  cache, layer = write(args[0], layer=args[1], at=args[2])
  np.testing.assert_array_equal(layer, cache[1, ..., :3])
  np.testing.assert_array_equal(layer, new.transpose(0, 2, 3, 1))
  text = jax.make_jaxpr(lambda c, n, at: write(c, layer=n, at=at))(*args)
  assert 'dynamic_slice[' not in str(text)
