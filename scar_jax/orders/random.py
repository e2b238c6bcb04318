"""Masked next set: random groups of tokens, asked for by position queries.

In: tokens `[B, N]` row-major and one permutation per sample. Out: for each set
its queries, then its contents; the contents of the last set are left out, so
a sequence has 2N - n_K target positions. Set sizes follow the cosine schedule
of MaskGIT. Source: method 1.6 and 9.6 (queries as in RandAR).
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scar_jax.orders.layout import (
  CONTENT,
  QUERY,
  Inputs,
  SampleState,
  grid_positions,
  put_set,
  take_set,
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


@dataclasses.dataclass(frozen=True)
class RandomOrder:
  """Random sets on a token grid (h, w); set sizes are static."""

  grid: tuple[int, int]
  num_sets: int = 16

  name: ClassVar[str] = 'random'
  uniform: ClassVar[bool] = False
  from_prefix: ClassVar[bool] = False

  def __post_init__(self):
    cosine_sizes(self.num_targets, self.num_sets)

  @property
  def num_targets(self) -> int:
    """N."""
    return self.grid[0] * self.grid[1]

  @property
  def set_sizes(self) -> tuple[int, ...]:
    """Cosine schedule over `num_sets` sets."""
    return cosine_sizes(self.num_targets, self.num_sets)

  @property
  def input_len(self) -> int:
    """2N - n_K."""
    return 2 * self.num_targets - self.set_sizes[-1]

  def _bounds(self, k: int) -> tuple[int, int]:
    """First and last + 1 target of set k (from 0)."""
    first = sum(self.set_sizes[:k])
    return first, first + self.set_sizes[k]

  @functools.cached_property
  def _plan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each input: its target, its kind, its set id."""
    rows = []
    for k, size in enumerate(self.set_sizes):
      target = np.arange(*self._bounds(k))
      rows.append((target, np.full(size, QUERY), np.full(size, 2 * k + 1)))
      rows.append((target, np.full(size, CONTENT), np.full(size, 2 * k + 2)))
    target, kind, ids = (
      np.concatenate(x) for x in zip(*rows[:-1], strict=True)
    )
    return target.astype(np.int32), kind, ids.astype(np.int32)

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
  ) -> Inputs:
    """Queries and contents of all sets; no `perm` means raster order."""
    target, kind, ids = self._plan
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

  def step_inputs(self, state: SampleState, k: int) -> Inputs:
    """Contents of the set before, then the queries of set k."""
    target, kind, ids = self._plan
    first, last = self._bounds(k)
    before = self.set_sizes[k - 1] if k else 0
    # In sequence order these are neighbours: set k's queries follow 2 c - n.
    here = slice(2 * first - before, first + last)
    grid, size = grid_positions(self.grid), last - first
    batch = state.tokens.shape[0]
    contents = take_set(state.tokens, first - before, before)
    return Inputs(
      tokens=jnp.concatenate(
        [contents, jnp.full((batch, size), -1, contents.dtype)], axis=1
      ),
      values=None,
      positions=grid[target[here]]
      if state.perm is None
      else jnp.asarray(grid)[state.perm[:, target[here]]],
      set_ids=ids[here],
      kind=tuple(int(x) for x in kind[here]),
      index=np.arange(here.start, here.stop, dtype=np.int32),
    )

  def logit_slots(self, k: int) -> np.ndarray:
    """The queries, which stand last."""
    before = self.set_sizes[k - 1] if k else 0
    return np.arange(before, before + self.set_sizes[k])

  def write(
    self,
    state: SampleState,
    k: int,
    new: Int[Array, 'B n'],
    accumulate: None = None,
  ) -> SampleState:
    """The tokens of set k, in target order."""
    return state.replace(tokens=put_set(state.tokens, new, self._bounds(k)[0]))

  def tokens(self, state: SampleState) -> Int[Array, 'B N']:
    """All tokens, row-major again."""
    if state.perm is None:
      return state.tokens
    return jnp.take_along_axis(
      state.tokens, jnp.argsort(state.perm, axis=1), axis=1
    )
