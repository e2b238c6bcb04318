"""The attention call against numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models.attention import (
  attend,
  attend_slots,
  in_parts,
  part_ends,
)
from scar_jax.orders.layout import set_mask


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


_VAR = np.repeat(np.arange(10), np.square([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]))


@pytest.mark.parametrize(
  ('set_ids', 'share'),
  [
    (np.arange(1000), 0.6),
    (_VAR, 0.65),
    (np.repeat([0, 1, 2], [240, 120, 160]), 0.76),
  ],
)
def test_parts_have_all_rows_and_no_more_keys_than_those_see(set_ids, share):
  ends = part_ends(set_ids)
  parts = [(first, end, end) for first, end in itertools.pairwise((0, *ends))]
  mask = np.asarray(set_mask(set_ids, set_ids))[0]
  assert [first for first, _, _ in parts] == [0, *(end for _, end, _ in parts)][
    :-1
  ]
  assert parts[-1][1] == len(set_ids)
  for first, end, keys in parts:
    assert mask[first:end, :keys].any(0).all()
    assert not mask[first:end, keys:].any()
  pairs = sum((end - first) * keys for first, end, keys in parts)
  assert 2 <= len(parts) <= 8
  assert pairs < share * mask.size


@pytest.mark.parametrize(
  'set_ids',
  [
    np.zeros(600, int),
    np.repeat([0, 1], [590, 10]),
    np.arange(600)[::-1],
    np.arange(256),
    jnp.arange(600),
  ],
)
def test_what_parts_would_not_help_has_none(set_ids):
  assert in_parts(set_ids) is None


@pytest.mark.parametrize('padded', [False, True])
def test_parts_attend_to_what_the_mask_shows(padded, monkeypatch):
  monkeypatch.setattr('scar_jax.models.attention._SHORTEST', 0)
  set_ids = np.repeat(np.arange(70), 2)
  q, k, v = _qkv(len(set_ids), len(set_ids))
  valid = np.ones((2, len(set_ids)), bool)
  valid[0, 30:90] = False
  valid = jnp.asarray(valid) if padded else None
  wanted = jax.random.normal(jax.random.key(1), q.shape)
  mask = set_mask(set_ids, set_ids, valid)
  parts = in_parts(set_ids)

  def whole(q, k, v):
    return jnp.sum(attend(q, k, v, mask, 0.3) * wanted)

  def ours(q, k, v):
    return jnp.sum(parts(q, k, v, 0.3, valid) * wanted)

  np.testing.assert_allclose(
    parts(q, k, v, 0.3, valid), attend(q, k, v, mask, 0.3), atol=1e-6
  )
  expected, found = (jax.grad(f, (0, 1, 2))(q, k, v) for f in (whole, ours))
  for e, f in zip(expected, found, strict=True):
    np.testing.assert_allclose(e, f, atol=1e-5)
  text = str(jax.make_jaxpr(jax.grad(ours, (0, 1, 2)))(q, k, v))
  assert f'{len(set_ids)},{len(set_ids)}]' not in text


def test_accelerators_attend_to_the_whole_sequence(monkeypatch):
  monkeypatch.setattr('scar_jax.models.attention.platform', lambda: 'gpu')
  assert in_parts(np.arange(600)) is None


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
