"""The steps of the random order, for any number of sets and given targets."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scar_cases import CLOSE, tiny_config, tiny_model

from scar_jax.models.scar import Scar
from scar_jax.orders import Known, RandomOrder, given_tokens


@st.composite
def orders(draw):
  """Small grids; every number of sets, from 1 to one for each token."""
  grid = draw(st.tuples(st.integers(1, 4), st.integers(2, 5)))
  count = grid[0] * grid[1]
  sets = draw(st.integers(1, count))
  return RandomOrder(grid, sets, draw(st.integers(0, count - 1)))


def _state(order, seed=0):
  rng = np.random.default_rng(seed)
  tokens = jnp.asarray(rng.integers(0, 99, (2, order.num_targets)))

  @jax.jit  # here and below: op by op would compile far more
  def begin(tokens, keys):
    state = order.start(2, keys)
    return state.replace(tokens=order.targets(tokens, state.perm))

  return tokens, begin(tokens, jax.random.split(jax.random.key(seed), 2))


def _joined(parts):
  return np.concatenate([np.asarray(p) for p in parts], axis=-1)


@settings(deadline=None, max_examples=10)
@given(order=orders())
def test_steps_together_are_the_training_sequence(order):
  tokens, state = _state(order)
  steps = [k for first, last in order.runs for k in range(first, last)]
  # The given sets enter with the queries of the first step.
  assert steps == list(range(steps[0], len(order.set_sizes)))
  assert sum(order.set_sizes[: steps[0]]) == order.given

  @jax.jit
  def run(tokens, state):
    parts = [order.step_inputs(state, k) for k in steps]
    return order.train_inputs(tokens, state.perm), parts

  full, parts = run(tokens, state)
  assert _joined(p.tokens for p in parts).tolist() == full.tokens.tolist()
  assert _joined(p.set_ids for p in parts).tolist() == full.set_ids.tolist()
  assert sum((p.kind for p in parts), ()) == full.kind
  positions = np.concatenate([p.positions for p in parts], axis=1)
  np.testing.assert_array_equal(positions, full.positions)


@settings(deadline=None, max_examples=10)
@given(order=orders())
def test_a_run_takes_a_traced_step(order):
  _, state = _state(order)
  for first, last in order.runs:
    new = jnp.full((2, order.set_sizes[first]), 7)

    def run(state, k, like=None, new=new):
      step = order.step_inputs(state, k, like)
      return step, order.write(state, k, new).tokens

    traced = jax.jit(run, static_argnums=2)
    static = jax.jit(run, static_argnums=1)
    for k in {first + 1, last - 1} & set(range(first + 1, last)):
      ours, written = traced(state, k, first)
      wanted, kept = static(state, k)
      assert ours.kind == wanted.kind
      for name in ('tokens', 'positions', 'set_ids'):
        np.testing.assert_array_equal(
          getattr(ours, name), getattr(wanted, name)
        )
      np.testing.assert_array_equal(written, kept)


def test_one_token_at_a_time_is_one_loop():
  assert RandomOrder((16, 16), 256).runs == ((0, 1), (1, 256))
  assert len(RandomOrder((16, 16), 16).runs) == 16


def test_given_targets_form_the_sets_of_training():
  whole = RandomOrder((4, 4), 4)
  assert whole.set_sizes == (2, 3, 5, 6)
  order = RandomOrder((4, 4), 4, given=7)
  assert order.set_sizes == (2, 3, 2, 1, 2, 3, 3)
  assert order.set_sizes[3:] == RandomOrder((3, 3), 4).set_sizes
  few = RandomOrder((4, 4), 4, given=14)  # fewer tokens left than sets
  assert few.set_sizes == (2, 3, 5, 4, 1, 1)


@pytest.mark.parametrize(
  ('known', 'total', 'expected'),
  [
    (0, 16, 0),
    (1, 16, 0),
    (2, 16, 2),
    (15, 16, 14),
    (143, 144, 126),
  ],
)
def test_given_tokens_are_counted_in_eighths(known, total, expected):
  assert given_tokens(known, total) == expected
  sizes = {given_tokens(n, total) for n in range(total)}
  assert len(sizes) <= 8
  assert max(sizes) < total


def test_known_tokens_come_first_and_stay_in_their_cells():
  order = RandomOrder((2, 3), 2)
  tokens = jnp.asarray([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]])
  keep = jnp.asarray([[0, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]], bool)
  start = order.start(2, jax.random.split(jax.random.key(3), 2))
  state = order.known_first(start, Known(tokens, keep))
  for row, cells in enumerate(state.perm.tolist()):
    count = int(keep[row].sum())
    assert set(cells[:count]) == set(np.flatnonzero(keep[row]).tolist())
    assert sorted(cells) == list(range(6))
    assert state.tokens[row].tolist() == [int(tokens[row, c]) for c in cells]
    # Within both parts the order is that of the permutation.
    unknown = [c for c in start.perm[row].tolist() if not keep[row, c]]
    assert cells[count:] == unknown
  np.testing.assert_array_equal(order.tokens(state), tokens)


def test_best_first_sorts_what_is_left():
  order = RandomOrder((2, 3), 3)
  assert order.set_sizes == (1, 2, 3)
  state = order.start(1, jax.random.split(jax.random.key(0), 1))
  state = state.replace(tokens=state.perm + 50)
  score = jnp.asarray([[0.0, 3.0, 1.0, 3.0, 2.0]])
  moved = order.best_first(state, 1, score)
  before, after = state.perm[0].tolist(), moved.perm[0].tolist()
  assert after == [before[i] for i in (0, 2, 4, 5, 3, 1)]
  np.testing.assert_array_equal(moved.tokens, moved.perm + 50)


def _rows(inputs, row=0):
  """(set id, kind, place, token) of every input of one sample."""
  positions = np.asarray(inputs.positions[row]).tolist()
  ids, tokens = np.asarray(inputs.set_ids), np.asarray(inputs.tokens[row])
  return {
    (int(i), k, *p, int(t))
    for i, k, p, t in zip(ids, inputs.kind, positions, tokens, strict=True)
  }


def test_one_sequence_serves_several_numbers_of_sets():
  counts = (2, 5, 16)
  order = RandomOrder((4, 4), 4, train_sets=counts)
  tokens, state = _state(order)
  draw = jax.jit(lambda c: order.train_inputs(tokens, state.perm, choice=c))
  for choice, sets in enumerate(counts):
    plain = RandomOrder((4, 4), sets)
    ours = _rows(draw(choice))
    want = _rows(plain.train_inputs(tokens, state.perm))
    assert want <= ours
    # What is left over is content of the last set: no query sees it.
    assert {row[0] for row in ours - want} <= {2 * sets}
  assert order.set_sizes == RandomOrder((4, 4), 4).set_sizes
  assert order.input_len == len(draw(0).kind) == 31


def test_a_model_of_several_numbers_of_sets_is_that_of_each():
  fields = dict(order='random', grid=(2, 3))
  cfg = tiny_config(num_sets=2, train_sets=(2, 3), **fields)
  model, params, cond = tiny_model(cfg)
  tokens = jnp.arange(18).reshape(3, 6) % 11
  perm = jnp.stack([jnp.roll(jnp.arange(6), i) for i in range(3)])
  logits, apply = [], jax.jit(model.apply)
  for choice, sets in enumerate((2, 3)):
    plain = Scar(tiny_config(num_sets=sets, **fields))
    want = jax.jit(plain.apply)(params, tokens, cond, perm=perm).logits
    ours = apply(params, tokens, cond, perm=perm, choice=choice).logits
    np.testing.assert_allclose(ours, want, **CLOSE)
    logits.append(want)
  assert np.abs(logits[0] - logits[1]).max() > 1e-3
  # Every step draws one of them.
  draw = jax.vmap(
    lambda key: (
      model.apply(params, tokens, cond, perm=perm, rngs={'order': key}).logits
    )
  )
  drawn = jax.jit(draw)(jax.random.split(jax.random.key(0), 8))
  gaps = np.array([np.abs(drawn - x).max(axis=(1, 2, 3)) for x in logits])
  assert (gaps.min(axis=0) < 1e-3).all()
  assert set(gaps.argmin(axis=0)) == {0, 1}


def test_impossible_numbers_of_sets_are_refused():
  with pytest.raises(ValueError, match=r'order.train_sets=\(2, 9\) for 4 tok'):
    RandomOrder((2, 2), 2, train_sets=(2, 9))
  with pytest.raises(
    ValueError, match=r"train_sets=\(2,\) with order='raster'"
  ):
    tiny_config(train_sets=(2,))
