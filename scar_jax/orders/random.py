"""Masked next set: random groups of tokens, asked for by position queries.

In: tokens `[B, N]` row-major and one permutation per sample. Out: for each set
its queries, then its contents; the contents of the last set are left out, so
a sequence has 2N - n_K target positions. Set sizes follow the cosine schedule
of MaskGIT. Targets that are known beforehand (inpainting) come first. Source:
method 1.6 and 9.6 (queries as in RandAR).
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from scar_jax.orders.layout import (
  CONTENT,
  QUERY,
  Inputs,
  SampleState,
  grid_positions,
  put_set,
)


@functools.lru_cache(maxsize=256)
def cosine_sizes(count: int, sets: int) -> tuple[int, ...]:
  """Sizes of `sets` sets that together hold `count` tokens, few first.

  Raises:
    ValueError: some set would be empty.
  """
  sizes, left = [], count
  for s in range(sets):
    rest = math.floor(count * math.cos(math.pi / 2 * (s + 1) / sets))
    rest = 0 if s == sets - 1 else max(1, min(left - 1, rest))
    sizes.append(left - rest)
    left = rest
  if sets < 1 or min(sizes) < 1:
    raise ValueError(
      f'order.num_sets={sets} for {count} tokens leaves a set empty; '
      f'accepted: 1 to {count} (set --config.order.num_sets)'
    )
  return tuple(sizes)


def given_tokens(known: int, total: int) -> int:
  """How many of `known` tokens enter before the first step.

  Rounded down to eighths of `total`, so that all masks together compile few
  programs; the rest of them take part in the steps without being drawn.
  """
  unit = -(-total // 8)
  return known // unit * unit


@struct.dataclass
class Known:
  """Tokens that are not drawn.

  Attributes:
    tokens: row-major.
    keep: True where the token is known.
    given: of these, in every sample, enter before the first step.
  """

  tokens: Int[Array, 'B N']
  keep: Bool[Array, 'B N']
  given: int = struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class RandomOrder:
  """Random sets on a token grid; their sizes are static.

  Attributes:
    grid: (h, w).
    num_sets: K, over the targets that are not given.
    given: targets known before sampling, first in target order. They form
      sets like those of training, and enter together with the first queries.
    train_sets: numbers of sets of which every training pass takes one, all with
      one sequence: the queries of all targets, then the contents of all that
      some query sees. () trains with `num_sets`, and a shorter sequence.
  """

  grid: tuple[int, int]
  num_sets: int = 16
  given: int = 0
  train_sets: tuple[int, ...] = ()

  name: ClassVar[str] = 'random'
  from_prefix: ClassVar[bool] = False

  def __post_init__(self):
    cosine_sizes(self.num_targets, self.num_sets)
    assert 0 <= self.given < self.num_targets
    assert not (self.given and self.train_sets)
    wrong = [k for k in self.train_sets if not 1 <= k <= self.num_targets]
    if wrong:
      raise ValueError(
        f'order.train_sets={self.train_sets} for {self.num_targets} tokens; '
        f'accepted: numbers from 1 to {self.num_targets} '
        '(set --config.order.train_sets)'
      )

  @property
  def num_targets(self) -> int:
    """N."""
    return self.grid[0] * self.grid[1]

  @functools.cached_property
  def _given_sizes(self) -> tuple[int, ...]:
    """The first sets of the whole schedule, the last one cut."""
    sizes, left = [], self.given
    for size in cosine_sizes(self.num_targets, self.num_sets):
      sizes.append(min(size, left))
      left -= sizes[-1]
    return tuple(size for size in sizes if size)

  @functools.cached_property
  def set_sizes(self) -> tuple[int, ...]:
    """Given sets, then the cosine schedule over `num_sets` sets."""
    left = self.num_targets - self.given
    return self._given_sizes + cosine_sizes(left, min(self.num_sets, left))

  @property
  def runs(self) -> tuple[tuple[int, int], ...]:
    """Neighbours with equally many contents and queries form a run."""
    sizes, first = self.set_sizes, len(self._given_sizes)
    runs: list[tuple[int, int]] = []
    for k in range(first, len(sizes)):
      if k > first + 1 and sizes[k - 2] == sizes[k - 1] == sizes[k]:
        runs[-1] = (runs[-1][0], k + 1)
      else:
        runs.append((k, k + 1))
    return tuple(runs)

  @property
  def input_len(self) -> int:
    """2N - n_K, of the smallest n_K in training."""
    return len(self._plan[0])

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    """First target of each set."""
    return np.cumsum((0, *self.set_sizes[:-1])).astype(np.int32)

  def _start(self, k: int | Array) -> Any:
    """First target of set k (from 0), which may be traced."""
    return int(self._starts[k]) if isinstance(k, int) else _at(self._starts, k)

  @functools.cached_property
  def _plan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each input: its target, its kind, its set id."""
    if self.train_sets:
      ids = self.train_ids[0]
      target = np.arange(len(ids), dtype=np.int32) % self.num_targets
      kind = np.where(np.arange(len(ids)) < self.num_targets, QUERY, CONTENT)
      return target, kind, ids
    rows = []
    for k, size in enumerate(self.set_sizes):
      target = self._starts[k] + np.arange(size)
      rows.append((target, np.full(size, QUERY), np.full(size, 2 * k + 1)))
      rows.append((target, np.full(size, CONTENT), np.full(size, 2 * k + 2)))
    target, kind, ids = (
      np.concatenate(x) for x in zip(*rows[:-1], strict=True)
    )
    return target.astype(np.int32), kind, ids.astype(np.int32)

  @functools.cached_property
  def train_ids(self) -> np.ndarray:
    """Set ids of the training sequence, int32 [len(train_sets), input_len]."""
    rows = []
    for k in self.train_sets:
      number = np.repeat(np.arange(1, k + 1), cosine_sizes(self.num_targets, k))
      rows.append(np.concatenate([2 * number - 1, 2 * number]))
    last = min(cosine_sizes(self.num_targets, k)[-1] for k in self.train_sets)
    return np.array(rows, np.int32)[:, : 2 * self.num_targets - last]

  @property
  def set_ids(self) -> np.ndarray:
    """Queries of set k: 2k - 1, its contents: 2k, with k from 1."""
    return self._plan[2]

  @property
  def logit_index(self) -> np.ndarray:
    """The queries; they come in target order."""
    return np.flatnonzero(self._plan[1] == QUERY).astype(np.int32)

  @property
  def side(self) -> tuple[int, int]:
    """The token grid."""
    return self.grid

  def draw(self, keys: Array) -> Int[Array, 'B N']:
    """One permutation for each PRNG key, whatever the batch."""
    return jax.vmap(jax.random.permutation, (0, None))(keys, self.num_targets)

  def targets(
    self, tokens: Int[Array, 'B N'], perm: Int[Array, 'B N'] | None = None
  ) -> Int[Array, 'B N']:
    """Tokens in permuted order."""
    if perm is None:
      return tokens
    return jnp.take_along_axis(jnp.asarray(tokens), perm, axis=1)

  def train_inputs(
    self,
    tokens: Int[Array, 'B N'],
    perm: Int[Array, 'B N'] | None = None,
    accumulate: None = None,
    choice: Int[Array, ''] | None = None,
  ) -> Inputs:
    """Queries and contents of all sets; no `perm` means raster order.

    Args:
      tokens: row-major.
      perm: see `draw`.
      accumulate: of the scale order.
      choice: index into `train_sets`, may be traced; the first by default.
    """
    target, kind, ids = self._plan
    if choice is not None:
      ids = _at(self.train_ids, choice)
    grid = grid_positions(self.grid)
    contents = self.targets(tokens, perm)[:, target]
    return Inputs(
      tokens=jnp.where(kind == CONTENT, contents, -1),
      values=None,
      positions=grid[target]
      if perm is None
      else jnp.asarray(grid)[perm[:, target]],
      set_ids=ids,
      kind=tuple(int(x) for x in kind),
      index=np.arange(len(ids), dtype=np.int32),
    )

  def start(self, batch: int, keys: Array | None = None) -> SampleState:
    """No token yet; the permutation is fixed by each sample's key."""
    perm = None if keys is None else self.draw(keys)
    return SampleState(jnp.zeros((batch, self.num_targets), jnp.int32), perm)

  def known_first(self, state: SampleState, known: Known) -> SampleState:
    """A start state whose first targets are the known ones."""
    kept = jnp.take_along_axis(known.keep, state.perm, axis=1)
    first = jnp.argsort(~kept, axis=1, stable=True)
    perm = jnp.take_along_axis(state.perm, first, axis=1)
    return state.replace(perm=perm, tokens=self.targets(known.tokens, perm))

  def best_first(
    self, state: SampleState, k: int, score: Float[Array, 'B n']
  ) -> SampleState:
    """Sorts the targets from set k on by falling score."""
    start = self._start(k)
    rank = jnp.argsort(-score, axis=1, stable=True)

    def sort(x: Array) -> Array:
      return put_set(x, jnp.take_along_axis(x[:, start:], rank, axis=1), start)

    return state.replace(perm=sort(state.perm), tokens=sort(state.tokens))

  def step_inputs(
    self,
    state: SampleState,
    k: int | Array,
    like: int | None = None,
    ahead: int | None = None,
  ) -> Inputs:
    """Contents of the set before, then the queries of set k.

    Args:
      state: of the sampler.
      k: step, traced if `like` is given.
      like: a step of the same run.
      ahead: ask for the next `ahead` targets in place of set k.
    """
    shape = k if like is None else like
    start, size = self._start(k), ahead or self.set_sizes[shape]
    if shape == len(self._given_sizes):
      target, kind, ids = (x[: 2 * self.given] for x in self._plan)
    else:
      before = self.set_sizes[shape - 1]
      target = start + np.arange(-before, 0)
      kind, ids = np.full(before, CONTENT), 2 * k + np.zeros(before, np.int32)
    join = np if isinstance(k, int) else jnp
    target = join.concatenate([target, start + np.arange(size)])
    kind = np.concatenate([kind, np.full(size, QUERY)])
    grid = grid_positions(self.grid)
    return Inputs(
      tokens=jnp.where(kind == CONTENT, state.tokens[:, target], -1),
      values=None,
      positions=_at(grid, target)
      if state.perm is None
      else _at(grid, state.perm[:, target]),
      set_ids=join.concatenate([ids, 2 * k + np.ones(size, np.int32)]),
      kind=tuple(int(x) for x in kind),
    )

  def write(
    self,
    state: SampleState,
    k: int | Array,
    new: Int[Array, 'B n'],
    accumulate: None = None,
  ) -> SampleState:
    """The tokens of set k, in target order."""
    return state.replace(tokens=put_set(state.tokens, new, self._start(k)))

  def tokens(self, state: SampleState) -> Int[Array, 'B N']:
    """All tokens, row-major again."""
    if state.perm is None:
      return state.tokens
    return jnp.take_along_axis(
      state.tokens, jnp.argsort(state.perm, axis=1), axis=1
    )

  def predicted(self, inputs: Inputs) -> Int[Array, '*B M']:
    """Queries predict the cell that they stand at, contents nothing."""
    row, column = jnp.moveaxis(jnp.asarray(inputs.positions), -1, 0)
    cell = (row * self.grid[1] + column).astype(jnp.int32)
    return jnp.where(np.asarray(inputs.kind) == QUERY, cell, -1)


def _at(table: np.ndarray, index: Any) -> Array:
  """Rows of a constant table; the index may be traced."""
  return jnp.asarray(table)[index]
