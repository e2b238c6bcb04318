"""The mask rule and the layouts, against brute force and stored tables."""

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from scar_jax.models.layers import rope_table
from scar_jax.orders import (
  RandomOrder,
  RasterOrder,
  ScaleOrder,
  cosine_sizes,
  make_layout,
  make_order,
  set_mask,
)
from scar_jax.orders.scale import scale_sides

# Op by op would compile far more, and sizes differ from case to case.
compiled_mask = jax.jit(set_mask)
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@st.composite
def orders(draw):
  """Any order of a small grid."""
  kind = draw(st.sampled_from(['raster', 'scale', 'random']))
  if kind == 'scale':
    sides = draw(st.sets(st.integers(1, 5), min_size=1, max_size=4))
    return ScaleOrder(tuple(sorted(sides)))
  grid = draw(GRIDS)
  if kind == 'raster':
    return RasterOrder(grid)
  # Half as many sets as tokens never leaves one empty.
  most = max(1, grid[0] * grid[1] // 2)
  return RandomOrder(grid, draw(st.integers(1, most)))


@settings(deadline=None, max_examples=50)
@given(
  q=st.lists(st.integers(-3, 6), min_size=1, max_size=7),
  extra=st.lists(st.integers(-3, 6), max_size=4),
  seed=st.integers(0, 9),
)
def test_mask_equals_the_rule_for_any_ids(q, extra, seed):
  ids = [*extra, *q]
  valid = np.random.default_rng(seed).random((2, len(ids))) < 0.6
  ours = compiled_mask(np.array(q), np.array(ids), valid, len(extra))
  ours = np.asarray(ours)
  for b in range(2):
    for i, q_id in enumerate(q):
      for j, k_id in enumerate(ids):
        allowed = (q_id >= k_id and valid[b, j]) or len(extra) + i == j
        assert ours[b, i, j] == allowed
  assert ours.any(-1).all()


def test_mask_without_padding_is_one_for_the_batch():
  ours = set_mask(np.array([0, 0, 1]), np.array([0, 0, 1]))
  assert ours.shape == (1, 3, 3)
  assert np.asarray(ours[0], int).tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


@settings(deadline=None, max_examples=60)
@given(
  order=orders(),
  prefix=st.none() | GRIDS,
  text=st.integers(1, 3),
  causal=st.booleans(),
)
def test_layout_of_any_order(order, prefix, text, causal):
  mode = 'causal' if causal else 'bidirectional'
  layout = make_layout(order, prefix, text, prefix_mask=mode)
  set0 = layout.set0_len
  assert layout.prefix_len == (prefix[0] * prefix[1] if prefix else 0)
  assert layout.length == set0 + order.input_len == len(layout.set_ids)
  assert len(layout.positions) == len(layout.zero_rope) == set0
  mask = np.asarray(compiled_mask(layout.set_ids, layout.set_ids))[0]
  assert mask.diagonal().all()
  assert not mask[:set0, set0:].any()
  assert mask[set0:, :set0].all()
  expected = np.tril(np.ones((set0, set0), bool)) if causal else True
  assert (mask[:set0, :set0] == expected).all()
  # A target is predicted from earlier sets only: the output that predicts set
  # k may see inputs that hold tokens of the sets before k, and no later ones.
  assert len(layout.logit_index) == order.num_targets == sum(order.set_sizes)
  tokens = np.arange(order.num_targets)[None]
  if order.name != 'scale':
    held = jax.jit(lambda t: order.train_inputs(t).tokens)(tokens)
    held = np.asarray(held)[0]
    set_of = np.repeat(np.arange(len(order.set_sizes)), order.set_sizes)
    for n, place in enumerate(layout.logit_index):
      seen = held[mask[place, set0:]]
      seen = set(seen[seen >= 0].tolist())
      assert seen == set(np.flatnonzero(set_of < set_of[n]).tolist())


def test_set_ids_of_each_order_by_hand():
  assert RasterOrder((1, 4)).set_ids.tolist() == [1, 2, 3]
  assert RasterOrder((1, 4)).logit_index.tolist() == [-1, 0, 1, 2]
  assert ScaleOrder((1, 2)).set_ids.tolist() == [1, 2, 2, 2, 2]
  order = RandomOrder((2, 2), 2)
  assert order.set_sizes == (2, 2)
  assert order.set_ids.tolist() == [1, 1, 2, 2, 3, 3]
  assert order.logit_index.tolist() == [0, 1, 4, 5]


def test_sequence_lengths_of_the_method_table():
  grid, text = (32, 32), 120
  assert make_layout(RasterOrder(grid), (16, 16), text).length == 1399
  assert make_layout(RasterOrder((16, 16)), (8, 8), 1).length == 320
  assert make_layout(ScaleOrder(), (8, 8), 0).length == 744
  assert make_layout(RandomOrder((16, 16), 16), (8, 8), 1).length == 552


def test_cosine_sizes_equal_the_stored_schedules(golden):
  arrays = golden('sampling')[1]
  names = [n for n in arrays if n.startswith('sets_')]
  assert len(names) == 22
  for name in names:
    _, count, sets = name.split('_')
    assert list(cosine_sizes(int(count), int(sets))) == arrays[name].tolist()


def test_as_many_sets_as_tokens_is_one_token_each():
  assert cosine_sizes(64, 64) == (1,) * 64


def _table(layout, order):
  inputs = order.train_inputs(np.zeros((1, order.num_targets), np.int32))
  positions = [layout.positions, layout.target_positions(inputs)]
  zero = np.pad(layout.zero_rope, (0, layout.target_len))
  table = rope_table(np.concatenate(positions), 16, zero_rows=zero)
  return np.stack(table, -1)


@pytest.mark.parametrize(
  ('name', 'grid', 'rope'),
  [
    ('scar_prefill', (4, 4), 'offset_p'),
    ('scar_prefill_1th', (3, 3), 'offset_p'),
    ('gpt_edit', (4, 4), 'offset_g'),
  ],
)
def test_rotary_tables_equal_the_reference(golden, name, grid, rope):
  expected = golden(name)[1]['rope']
  order = RasterOrder(grid)
  layout = make_layout(order, (4, 4), 5, prefix_rope=rope)
  ours = _table(layout, order)
  np.testing.assert_allclose(ours, expected[: layout.length], atol=1e-6)


def test_prefix_rope_variants_by_hand():
  order, prefix = RasterOrder((4, 4)), (2, 2)

  def layout(name):
    return make_layout(order, prefix, 1, prefix_rope=name)

  assert layout('offset_p').origin == (2, 2)
  assert layout('offset_g').origin == (4, 4)
  corners = [[0, 0], [0, 1], [1, 0], [1, 1]]
  assert layout('offset_g').positions[:4].tolist() == corners
  assert layout('aligned').origin == (0, 0)
  aligned = layout('aligned').positions[:4].tolist()
  assert aligned == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
  assert layout('none').positions[:4].tolist() == [[0, 0]] * 4


def test_text_rows_are_zero_or_the_identity():
  order = RasterOrder((2, 2))
  zero = make_layout(order, (1, 1), 2).zero_rope
  assert zero.tolist() == [False, True, True]
  layout = make_layout(order, (1, 1), 2, text_rope='identity')
  assert not layout.zero_rope.any()
  assert not layout.positions[1:].any()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'prefix_mask': 'x'}, "prefix_mask='x'; accepted: bidirectional, causal"),
    ({'prefix_rope': 'x'}, "prefix_rope='x'; accepted: offset_p, offset_g"),
    ({'text_rope': 'x'}, "text_rope='x'; accepted: zero, identity"),
    ({'prefix_grid': None, 'text_len': 0}, 'there is neither; accepted: a pre'),
  ],
)
def test_impossible_layouts_are_refused(changes, message):
  args = {'prefix_grid': (2, 2), 'text_len': 1, **changes}
  with pytest.raises(ValueError, match=message):
    make_layout(RasterOrder((2, 2)), **args)


def test_impossible_orders_are_refused():
  with pytest.raises(ValueError, match=r"order.name='x'; accepted: raster, sc"):
    make_order('x', (4, 4))
  with pytest.raises(ValueError, match=r'order.num_sets=9 for 4 tokens'):
    make_order('random', (2, 2), 9)
  with pytest.raises(ValueError, match=r'patch_nums=\(2, 1\); accepted'):
    ScaleOrder((2, 1))
  with pytest.raises(ValueError, match=r'for a token grid of \(4, 4\)'):
    make_order('scale', (4, 4), patch_nums=(1, 2))
  assert make_order('scale', (16, 16)).num_targets == 680


def test_sides_of_scales_grow_to_the_grid():
  assert scale_sides(16) == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
  assert scale_sides(12) == (1, 2, 3, 4, 6, 9, 12)
  for grid in range(1, 65):
    sides = scale_sides(grid)
    assert sides[0] == 1
    assert sides[-1] == grid
    ScaleOrder(sides)
