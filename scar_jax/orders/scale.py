"""Next scale: every set is one scale of a residual pyramid (VAR).

In: ids of all scales `[B, N]`, concatenated, and the tokenizer's function that
adds one scale to the running latent. Out: for each position of scale k the
latent of the scales before, resized to scale k; the first scale is a start
token. A position predicts the token at itself. Source: method 1.5, 2.3, 9.5.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scar_jax.orders.layout import (
  START,
  VALUE,
  Inputs,
  SampleState,
  grid_positions,
  put_set,
)

# VAR's scales by image size in pixels, for 16 pixels a token (method 2.3).
PATCH_NUMS = {
  256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
  512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
  1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


def scale_sides(grid: int) -> tuple[int, ...]:
  """Sides for a token grid: VAR's where it has some, else the like of them.

  Of other grids every side is about 1.45 times the one before, much as VAR's at
  512 pixels: 1, 2, 3, 4, 6, 9, 13, ... up to `grid`.
  """
  for sides in PATCH_NUMS.values():
    if sides[-1] == grid:
      return sides
  made = [1]
  while made[-1] < grid:
    made.append(min(max(made[-1] + 1, round(1.45 * made[-1])), grid))
  return tuple(made)


# (scale from 0, running latent or None, ids [B, p * p] or weights over the
# codes [B, p * p, V]) -> (running latent, inputs of the next scale
# [B, p' * p', Cv] or None after the last).
Accumulate = Callable[[int, Any, Array], tuple[Any, Any]]


def blank(patch_nums: tuple[int, ...], channels: int) -> Accumulate:
  """An `Accumulate` of zeros, to initialise a model without its tokenizer."""

  def accumulate(k: int, latent: None, ids: Array) -> tuple[None, Array | None]:
    if k + 1 == len(patch_nums):
      return None, None
    return None, jnp.zeros((ids.shape[0], patch_nums[k + 1] ** 2, channels))

  return accumulate


@dataclasses.dataclass(frozen=True)
class ScaleOrder:
  """Square scales of sides `patch_nums`, the last is the token grid.

  A side may come again: such a scale codes what the one before left over.
  """

  patch_nums: tuple[int, ...] = PATCH_NUMS[256]

  name: ClassVar[str] = 'scale'
  from_prefix: ClassVar[bool] = False

  def __post_init__(self):
    sides = self.patch_nums
    if not sides or sides[0] < 1 or list(sides) != sorted(sides):
      raise ValueError(
        f'patch_nums={sides}; accepted: sides from 1 on, none smaller than '
        'the one before (set --config.model.patch_nums of the tokenizer)'
      )

  @property
  def set_sizes(self) -> tuple[int, ...]:
    """Tokens of each scale, its side squared."""
    return tuple(p * p for p in self.patch_nums)

  @property
  def runs(self) -> tuple[tuple[int, int], ...]:
    """Every scale has a shape of its own."""
    return tuple((k, k + 1) for k in range(len(self.patch_nums)))

  @property
  def num_targets(self) -> int:
    """N, tokens of all scales."""
    return sum(self.set_sizes)

  @property
  def input_len(self) -> int:
    """N: every position predicts itself."""
    return self.num_targets

  def _levels(self) -> np.ndarray:
    return np.repeat(np.arange(len(self.set_sizes)), self.set_sizes)

  @property
  def set_ids(self) -> np.ndarray:
    """Scale numbers from 1."""
    return (self._levels() + 1).astype(np.int32)

  @property
  def logit_index(self) -> np.ndarray:
    """Each position itself."""
    return np.arange(self.num_targets, dtype=np.int32)

  @property
  def side(self) -> tuple[int, int]:
    """The grid of the last scale."""
    return (self.patch_nums[-1], self.patch_nums[-1])

  def positions(self) -> np.ndarray:
    """Cell centres of all scales on the last grid, float32 [N, 2]."""
    last = self.patch_nums[-1]
    return np.concatenate(
      [
        (grid_positions((p, p)) + 0.5) * (last / p) - 0.5
        for p in self.patch_nums
      ]
    ).astype(np.float32)

  def _inputs(self, k0: int, k1: int, batch: int, values: Any) -> Inputs:
    """Inputs of scales k0 ... k1 - 1."""
    levels = self._levels()
    here = np.flatnonzero((levels >= k0) & (levels < k1))
    return Inputs(
      tokens=jnp.full((batch, len(here)), -1, jnp.int32),
      values=values,
      positions=self.positions()[here],
      set_ids=self.set_ids[here],
      kind=tuple(START if n == 0 else VALUE for n in levels[here]),
      level=tuple(int(n) for n in levels[here]),
      index=here.astype(np.int32),
    )

  def targets(
    self, tokens: Int[Array, 'B N'], perm: None = None
  ) -> Int[Array, 'B N']:
    """Ids of all scales, concatenated."""
    return tokens

  def train_inputs(
    self,
    tokens: Int[Array, 'B N'],
    perm: None = None,
    accumulate: Accumulate | None = None,
  ) -> Inputs:
    """All scales; `values` of the start positions are zero.

    Built by the steps that sampling takes, so both see the same inputs.

    Raises:
      ValueError: no `accumulate`, which the tokenizer gives.
    """
    state = self.start(tokens.shape[0])
    scales, first = [], 0
    for k, size in enumerate(self.set_sizes[:-1]):
      ids = tokens[:, first : first + size]
      state = self.write(state, k, ids, accumulate)
      scales.append(state.values)
      first += size
    values = None
    if scales:
      values = jnp.concatenate(scales, axis=1)
      values = jnp.pad(values, ((0, 0), (self.set_sizes[0], 0), (0, 0)))
    return self._inputs(0, len(self.set_sizes), tokens.shape[0], values)

  def start(self, batch: int, keys: Array | None = None) -> SampleState:
    """No scale yet."""
    return SampleState(jnp.zeros((batch, self.num_targets), jnp.int32))

  def step_inputs(
    self, state: SampleState, k: int, like: int | None = None
  ) -> Inputs:
    """Start tokens, or the resized latent of the scales before k."""
    return self._inputs(k, k + 1, state.tokens.shape[0], state.values)

  def write(
    self,
    state: SampleState,
    k: int,
    new: Int[Array, 'B n'],
    accumulate: Accumulate | None = None,
  ) -> SampleState:
    """Adds scale k to the latent and prepares the next scale's inputs.

    Raises:
      ValueError: no `accumulate`, which the tokenizer gives.
    """
    if accumulate is None:
      raise ValueError(
        'the scale order got accumulate=None; accepted: the function of a '
        'multi-scale tokenizer that adds one scale to the latent '
        '(set --config.tokenizer.artifact to a multi-scale tokenizer)'
      )
    latent, values = accumulate(k, state.latent, new)
    first = sum(self.set_sizes[:k])
    return state.replace(
      tokens=put_set(state.tokens, new, first), latent=latent, values=values
    )

  def tokens(self, state: SampleState) -> Int[Array, 'B N']:
    """Ids of all scales, concatenated."""
    return state.tokens

  def predicted(self, inputs: Inputs) -> Int[Array, ' M']:
    """The id at the place of each, of all scales."""
    return inputs.index
