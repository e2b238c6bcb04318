"""Set ids, positions and the mask of a whole sequence [prefix; text; target].

In: an order, the prefix grid and the text length. Out: a `Layout` of numpy
arrays, built once from the config; `set_mask`, the only attention rule;
`Inputs` and `SampleState`, what an order hands to the model and the sampler.
Orders own no parameters. Source: method 1.3, 1.7 and 3.4.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# What stands at a target position; the model picks the embedding by kind.
CONTENT, QUERY, VALUE, START = 0, 1, 2, 3

PREFIX_MASKS = ('bidirectional', 'causal')
PREFIX_ROPES = ('offset_p', 'offset_g', 'aligned', 'none')
TEXT_ROPES = ('zero', 'identity')


@struct.dataclass
class Inputs:
  """What the decoder sees at M target positions.

  Attributes:
    tokens: int32 [B, M], -1 where the position is no content.
    values: float32 [B, M, Cv] latents of the scale order, else None.
    positions: float32 [M, 2] or [B, M, 2], (row, column) on the token grid.
    set_ids: int32 [M].
    kind: M values of CONTENT, QUERY, VALUE, START.
    level: M scale numbers from 0 (scale order), else None.
    index: int32 [M] place of each position within all target inputs.
  """

  tokens: Int[Array, 'B M']
  values: Float[Array, 'B M C'] | None
  positions: Float[Array, '*B M 2']
  set_ids: Int[Array, ' M']
  kind: tuple[int, ...] = struct.field(pytree_node=False)
  level: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
  index: Int[Array, ' M'] | None = None


@struct.dataclass
class SampleState:
  """What a sampler carries between steps.

  Attributes:
    tokens: int32 [B, N] in target order; 0 where not sampled yet.
    perm: int32 [B, N] grid index of each target (random order), else None.
    latent: running sum of the scale order's residuals, else None.
    values: next scale's inputs [B, M, Cv] (scale order), else None.
  """

  tokens: Int[Array, 'B N']
  perm: Int[Array, 'B N'] | None = None
  latent: Any = None
  values: Any = None


class Order(Protocol):
  """How the target is cut into sets; the only thing that orders differ in.

  Steps are numbered from 0. `from_prefix` says that step 0 has no inputs: its
  logits come from the last position of set 0.
  """

  name: str
  from_prefix: bool

  @property
  def set_sizes(self) -> tuple[int, ...]:
    """Targets predicted in each step."""

  @property
  def runs(self) -> tuple[tuple[int, int], ...]:
    """Steps that have inputs, cut into runs [first, last) of one shape.

    In a run of several steps the step number may be traced.
    """

  @property
  def num_targets(self) -> int:
    """N."""

  @property
  def input_len(self) -> int:
    """Target positions of a training sequence."""

  @property
  def set_ids(self) -> np.ndarray:
    """int32 [input_len], all above 0."""

  @property
  def logit_index(self) -> np.ndarray:
    """int32 [N]: input that predicts each target; -1 is the last of set 0."""

  @property
  def side(self) -> tuple[int, int]:
    """(h, w) of the grid that positions are measured on."""

  def targets(
    self, tokens: Int[Array, 'B N'], perm: Int[Array, 'B N'] | None = None
  ) -> Int[Array, 'B N']:
    """Tokens in the order in which the logits predict them."""

  def train_inputs(self, tokens, perm=None, accumulate=None) -> Inputs:
    """Inputs of all target positions, each from sets before it."""

  def start(self, batch: int, keys: Array | None = None) -> SampleState:
    """The state before step 0; `keys` is one PRNG key per sample."""

  def step_inputs(self, state: SampleState, k, like=None) -> Inputs | None:
    """Inputs of sampling step k; None if it has none.

    Its targets are predicted by the last of them, in target order.
    Where k is traced, `like` is the number of any step of its run.
    """

  def write(self, state: SampleState, k, new, accumulate=None) -> SampleState:
    """The state with the tokens [B, n_k] of step k."""

  def tokens(self, state: SampleState) -> Int[Array, 'B N']:
    """The finished target, in the layout that `targets` takes."""

  def predicted(self, inputs: Inputs) -> Int[Array, '*B M']:
    """Which target each input predicts, as `tokens` lays them out; or -1."""


def grid_positions(grid: tuple[int, int]) -> np.ndarray:
  """(row, column) of each cell, row-major, float32 [h*w, 2]."""
  rows, columns = np.indices(grid).reshape(2, -1)
  return np.stack([rows, columns], -1).astype(np.float32)


def laid_over(grid: tuple[int, int], side: tuple[int, int]) -> np.ndarray:
  """Centres of the cells of one grid, measured on another over the same area.

  Returns:
    (row, column) of each cell of `grid` in cells of `side`, float32 [h*w, 2].
  """
  ratio = np.asarray(side, np.float32) / np.asarray(grid, np.float32)
  return (grid_positions(grid) + 0.5) * ratio - 0.5


def set_mask(
  q_ids: Int[Array, '*B Lq'],
  k_ids: Int[Array, ' S'],
  k_valid: Bool[Array, 'B S'] | None = None,
  q_start: int | Int[Array, ''] = 0,
) -> Bool[Array, 'B Lq S']:
  """Which key each query may attend to (method 1.3).

  Args:
    q_ids: set ids of the queries, [Lq] or [B, Lq].
    k_ids: set ids of the keys.
    k_valid: False at keys hidden from all but themselves (padding).
    q_start: key slot of the first query; 0 without a cache.

  Returns:
    [B, Lq, S], or [1, Lq, S] if nothing depends on the sample.
  """
  q_ids, k_ids = jnp.asarray(q_ids), jnp.asarray(k_ids)
  q_ids = q_ids[None] if q_ids.ndim == 1 else q_ids
  allowed = q_ids[:, :, None] >= k_ids[None, None, :]
  if k_valid is not None:
    allowed = allowed & k_valid[:, None, :]
  slots = q_start + jnp.arange(q_ids.shape[1])
  itself = slots[:, None] == jnp.arange(k_ids.shape[0])[None, :]
  return allowed | itself[None]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """Everything static about a training sequence of L positions.

  Attributes:
    set_ids: int32 [L].
    positions: float32 [L0, 2] of prefix and text; see `origin` for targets.
    zero_rope: bool [L0], rows whose cos and sin are both 0.
    logit_index: int32 [N], position of L that predicts each target.
    origin: added to the grid positions of the target.
    prefix_len: P.
    text_len: T, 1 for a class token.
    target_len: positions after set 0.
  """

  set_ids: np.ndarray
  positions: np.ndarray
  zero_rope: np.ndarray
  logit_index: np.ndarray
  origin: tuple[int, int]
  prefix_len: int
  text_len: int
  target_len: int

  @property
  def set0_len(self) -> int:
    """L0 = P + T."""
    return self.prefix_len + self.text_len

  @property
  def length(self) -> int:
    """L."""
    return self.set0_len + self.target_len

  def target_positions(self, inputs: Inputs) -> Array:
    """RoPE coordinates of target inputs, the prefix's offset included."""
    return inputs.positions + np.asarray(self.origin, np.float32)

  def predictors(self, hidden: Float[Array, 'B L D']) -> Float[Array, 'B N D']:
    """States that predict the targets, in target order."""
    first, last = int(self.logit_index[0]), int(self.logit_index[-1])
    if np.array_equal(self.logit_index, np.arange(first, last + 1)):
      return hidden[:, first : last + 1]  # a slice, not a gather
    return hidden[:, self.logit_index]


def _checked(name: str, value: str, accepted: tuple[str, ...]) -> None:
  if value not in accepted:
    raise ValueError(
      f'{name}={value!r}; accepted: {", ".join(accepted)} '
      f'(set --config.prefix.{name})'
    )


def make_layout(
  order: Order,
  prefix_grid: tuple[int, int] | None,
  text_len: int,
  prefix_mask: str = 'bidirectional',
  prefix_rope: str = 'offset_p',
  text_rope: str = 'zero',
) -> Layout:
  """The layout of [prefix; text; target inputs].

  Args:
    order: of the target.
    prefix_grid: (p_h, p_w), None without a prefix.
    text_len: text positions, 1 for a class token, 0 for none.
    prefix_mask: 'bidirectional' (the paper) or 'causal' (the official code:
      set-0 positions get the ids -L0 ... -1).
    prefix_rope: where the target grid starts: 'offset_p' and 'offset_g' put
      it one prefix (target) grid further in both axes; 'aligned' lays the
      prefix over the target; 'none' leaves the prefix unrotated.
    text_rope: 'zero' (cos = sin = 0, as LlamaGen) or 'identity'.

  Raises:
    ValueError: an unknown name, or a raster order without any set-0 position.
  """
  _checked('prefix_mask', prefix_mask, PREFIX_MASKS)
  _checked('prefix_rope', prefix_rope, PREFIX_ROPES)
  _checked('text_rope', text_rope, TEXT_ROPES)
  grid = prefix_grid or (0, 0)
  prefix_len = grid[0] * grid[1]
  set0 = prefix_len + text_len
  if order.from_prefix and not set0:
    raise ValueError(
      f'order.name={order.name!r} predicts its first token from the prefix or '
      'the text, and there is neither; accepted: a prefix, text or a class '
      "(set --config.prefix.compress to another value than 'off')"
    )
  positions = grid_positions(grid)
  origin = (0, 0)
  if prefix_len and prefix_rope == 'offset_p':
    origin = grid
  elif prefix_len and prefix_rope == 'offset_g':
    origin = order.side
  elif prefix_len and prefix_rope == 'aligned':
    positions = laid_over(grid, order.side)
  elif prefix_len:
    positions = np.zeros_like(positions)
  ids = np.arange(-set0, 0) if prefix_mask == 'causal' else np.zeros(set0)
  text_positions = np.zeros((text_len, 2), np.float32)
  index = order.logit_index.astype(np.int32)
  return Layout(
    set_ids=np.concatenate([ids, order.set_ids]).astype(np.int32),
    positions=np.concatenate([positions, text_positions]).astype(np.float32),
    zero_rope=np.arange(set0) >= (prefix_len if text_rope == 'zero' else set0),
    logit_index=set0 + index,
    origin=(int(origin[0]), int(origin[1])),
    prefix_len=prefix_len,
    text_len=text_len,
    target_len=order.input_len,
  )


def take_set(tokens: Int[Array, 'B N'], start: Any, size: int) -> jax.Array:
  """`tokens[:, start : start + size]`, the start may be traced."""
  return jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)


def put_set(
  tokens: Int[Array, 'B N'], new: Int[Array, 'B n'], start: Any
) -> jax.Array:
  """`tokens` with `new` written from column `start` on."""
  new = new.astype(tokens.dtype)
  return jax.lax.dynamic_update_slice_in_dim(tokens, new, start, axis=1)
