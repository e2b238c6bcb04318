"""Next token: every set is one token, in raster order (LlamaGen).

In: tokens `[B, N]`, row-major. Out: inputs for N - 1 positions: the tokens but
the last, each at its own grid position; the first is predicted by the last
set-0 position. Source: method 1.4 and 9.4.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scar_jax.orders.layout import (
  CONTENT,
  Inputs,
  SampleState,
  grid_positions,
  put_set,
  take_set,
)


@dataclasses.dataclass(frozen=True)
class RasterOrder:
  """The raster order on a token grid (h, w)."""

  grid: tuple[int, int]

  name: ClassVar[str] = 'raster'
  from_prefix: ClassVar[bool] = True

  @property
  def num_targets(self) -> int:
    """N."""
    return self.grid[0] * self.grid[1]

  @property
  def set_sizes(self) -> tuple[int, ...]:
    """One token in each of N steps."""
    return (1,) * self.num_targets

  @property
  def runs(self) -> tuple[tuple[int, int], ...]:
    """All steps after the first have one shape."""
    return ((1, self.num_targets),) if self.num_targets > 1 else ()

  @property
  def input_len(self) -> int:
    """N - 1: the last token predicts nothing."""
    return self.num_targets - 1

  @property
  def set_ids(self) -> np.ndarray:
    """1 ... N - 1."""
    return np.arange(1, self.num_targets, dtype=np.int32)

  @property
  def logit_index(self) -> np.ndarray:
    """Input i predicts target i + 1."""
    return np.arange(-1, self.num_targets - 1, dtype=np.int32)

  @property
  def side(self) -> tuple[int, int]:
    """The token grid."""
    return self.grid

  def targets(
    self, tokens: Int[Array, 'B N'], perm: None = None
  ) -> Int[Array, 'B N']:
    """The tokens themselves."""
    return tokens

  def train_inputs(
    self, tokens: Int[Array, 'B N'], perm: None = None, accumulate: None = None
  ) -> Inputs:
    """All tokens but the last, each at its own position."""
    m = self.input_len
    return Inputs(
      tokens=tokens[:, :-1],
      values=None,
      positions=grid_positions(self.grid)[:-1],
      set_ids=self.set_ids,
      kind=(CONTENT,) * m,
      index=np.arange(m, dtype=np.int32),
    )

  def start(self, batch: int, keys: Array | None = None) -> SampleState:
    """No token yet."""
    return SampleState(jnp.zeros((batch, self.num_targets), jnp.int32))

  def step_inputs(
    self, state: SampleState, k: int | Array, like: int | None = None
  ) -> Inputs | None:
    """Token k - 1; k may be traced if it is above 0."""
    if isinstance(k, int) and k == 0:
      return None
    at = jnp.asarray(k, jnp.int32) - 1
    positions = jnp.asarray(grid_positions(self.grid))
    return Inputs(
      tokens=take_set(state.tokens, at, 1),
      values=None,
      positions=jax.lax.dynamic_slice_in_dim(positions, at, 1),
      set_ids=at[None] + 1,
      kind=(CONTENT,),
      index=at[None],
    )

  def write(
    self,
    state: SampleState,
    k: int | Array,
    new: Int[Array, 'B 1'],
    accumulate: None = None,
  ) -> SampleState:
    """Token k."""
    return state.replace(tokens=put_set(state.tokens, new, k))

  def tokens(self, state: SampleState) -> Int[Array, 'B N']:
    """All tokens, row-major."""
    return state.tokens

  def predicted(self, inputs: Inputs) -> Int[Array, ' M']:
    """The token after each."""
    return jnp.asarray(inputs.index) + 1
