"""The steps of one sampling, traced: start, any number of pieces, result.

In: a `Scar`, its variables, `Conditions` and one seed per sample. Out: the
state after each piece of the steps, so that `sampling.py` can do all of them in
one program, or show the picture as it grows. Set 0 is prefilled for all
guidance branches stacked along the batch; a piece of steps of one shape is
scanned, a single step unrolled. Source: method 9.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from scar_jax.filters import (
  SamplerConfig,
  draw,
  guide,
  mixture,
  probabilities,
  ramp_weights,
)
from scar_jax.models.blocks import Modulation
from scar_jax.models.cache import KVCache, joined
from scar_jax.models.conditions import Conditions
from scar_jax.models.scar import Scar
from scar_jax.models.stack import taken_apart
from scar_jax.orders.layout import Inputs, SampleState, put_set, take_set
from scar_jax.orders.random import Known
from scar_jax.orders.scale import Accumulate
from scar_jax.sampling_steps import Piece, sampling_order
from scar_jax.types import PyTree

# Which part of the conditions each branch of guidance loses: (text, prefix).
_BRANCHES = {
  'none': ((False, False),),
  'text': ((False, False), (True, False)),
  'image': ((False, False), (False, True)),
  'image_text': ((False, False), (True, False), (True, True)),
}
# Stream of the permutations; step k draws from stream k, and its noise of the
# confidence from this one - 1 - k.
PERMUTATION = 2**31 - 1


def branch_count(mode: str) -> int:
  """How often a guidance mode runs the model for each sample."""
  return len(_BRANCHES[mode])


class Generated(NamedTuple):
  """What `generate` returns.

  Attributes:
    tokens: finished targets, row-major.
    bad: samples whose logits no draw was possible from.
    latent: sum of the codes (scale order; mixed with `smooth`), or their means.
    done: targets that are drawn; None is all of them.
    guided: guided logits in target order, only with `trace`.
    raw: logits of every branch, the conditional one first, with `trace`.
    perm: grid index of each target (random order), with `trace`.
  """

  tokens: Int[Array, 'B N']
  bad: Bool[Array, ' B']
  latent: Float[Array, 'B h w C'] | None = None
  done: Bool[Array, 'B N'] | None = None
  guided: Float[Array, 'B N V'] | None = None
  raw: Float[Array, 'G B N V'] | None = None
  perm: Int[Array, 'B N'] | None = None


def stack_branches(cond: Conditions, mode: str) -> Conditions:
  """The conditions of all guidance branches, [conditional; null ...].

  Null rows asked for in `cond` stay null in every branch.
  """
  branches = _BRANCHES[mode]
  batch = jax.tree.leaves(cond)[0].shape[0]
  lost = {
    'null_text': any(text for text, _ in branches),
    'null_prefix': any(prefix for _, prefix in branches),
  }
  for name, needed in lost.items():
    if needed and getattr(cond, name) is None:
      cond = cond.replace(**{name: jnp.zeros(batch, bool)})
  stacked = jax.tree.map(lambda t: jnp.concatenate([t] * len(branches)), cond)
  for i, name in enumerate(lost):
    if getattr(cond, name) is not None:
      rows = np.repeat([branch[i] for branch in branches], batch)
      stacked = stacked.replace(**{name: getattr(stacked, name) | rows})
  return stacked


def cache_size(length: int) -> int:
  """Slots for `length` positions, padded so that few sizes compile."""
  return -(-length // 16) * 16


def _tiled(inputs: Any, count: int) -> Inputs:
  """The same inputs for every branch."""

  def tile(t):
    return None if t is None else jnp.concatenate([t] * count)

  positions = inputs.positions
  return inputs.replace(
    tokens=tile(inputs.tokens),
    values=tile(inputs.values),
    positions=tile(positions) if positions.ndim == 3 else positions,
  )


def _adds(accumulate: Accumulate, codes: Float[Array, 'B n V']) -> Accumulate:
  """`accumulate` of a mixture of codes in place of the ids it is given."""
  return lambda k, latent, ids: accumulate(k, latent, codes)


@struct.dataclass
class Carry:
  """What one piece hands to the next.

  Attributes:
    state: tokens so far.
    cache: keys and values of all branches.
    steered: the condition of the adaln blocks.
    bad: samples whose logits no draw was possible from.
  """

  state: SampleState
  cache: KVCache
  steered: Modulation | None
  bad: Bool[Array, ' B']


class Loop:
  """One sampling, inside of a traced function; see `sampling.generate`.

  Args:
    model: the model.
    variables: its parameters.
    seeds: one integer per sample.
    scales: guidance on text and image, and the temperature.
    cfg: filters and guidance mode, static.
    forced: tokens in target order that replace the draws.
    trace: keep the logits.
    accumulate: of `Parts`; orders other than scale need it for `mean_code`.
    known: tokens to keep, for the random order.
  """

  def __init__(
    self,
    model: Scar,
    variables: PyTree,
    seeds: Int[Array, ' B'],
    scales: Float[Array, ' 3'],
    cfg: SamplerConfig,
    forced: Int[Array, 'B N'] | None = None,
    trace: bool = False,
    accumulate: Accumulate | None = None,
    known: Known | None = None,
  ):
    self.model, self.variables, self.cfg = model, variables, cfg
    self.seeds, self.scales, self.forced = seeds, scales, forced
    self.trace, self.accumulate, self.known = trace, accumulate, known
    order = sampling_order(model.cfg, cfg, known.given if known else None)
    self.order: Any = order
    self.batch = seeds.shape[0]
    self.branches = branch_count(cfg.guidance_mode)
    self.sizes = order.set_sizes
    self.starts = [0, *itertools.accumulate(self.sizes)]
    self.weights = ramp_weights(self.sizes, cfg)

  def begin(self, cond: Conditions, copies: int = 1) -> tuple[Carry, Any]:
    """Prefills set 0, and draws the first set where that predicts it.

    Args:
      cond: conditions of B / copies samples.
      copies: that many samples in a row share a condition, whose set 0 is
        computed once.

    Returns:
      The start, and logits of the first set or None.
    """
    order, mode = self.order, self.cfg.guidance_mode
    model = self.model
    length = model.cfg.make_layout().set0_len + order.input_len
    shares = mode == 'text' and model.cfg.shared_len > 0
    prefilled: Any = model.apply(
      self.variables,
      stack_branches(cond, mode),
      cache_size(length),
      self.branches if shares else 1,
      method='prefill',
    )
    if copies > 1:
      prefilled = _copied(prefilled, copies)
    logits, cache, steered = prefilled
    state = order.start(self.batch, sample_keys(self.seeds, PERMUTATION))
    if self.known is not None:
      state = order.known_first(state, self.known)
    if self.cfg.mean_code:
      state = state.replace(latent=self._codes(state.tokens))
    carry = Carry(state, cache, steered, jnp.zeros(self.batch, bool))
    if not order.from_prefix:
      return carry, None
    state, bad, log = self._choose(
      state, logits, 0, self.sizes[0], 0, self.weights[0]
    )
    return carry.replace(state=state, bad=bad), log

  def advance(
    self, carry: Carry, run: tuple[int, int], opens: bool, xs: Any
  ) -> tuple[Carry, Any]:
    """The steps of a piece: all of a run, or some of its neighbours.

    Args:
      carry: what came before.
      run: [first, last) steps of one shape.
      opens: whether the piece is the first of its run.
      xs: `self.xs` of the piece, may be traced.

    Returns:
      What comes after, and the logits if they are kept.
    """
    first, last = run
    if last - first == 1:
      if self.cfg.schedule == 'confidence' and last < len(self.sizes):
        state = self._sort_by_confidence(carry, first)
        carry = carry.replace(state=state)
      return self._step(
        carry, first, first, self.starts[first], self.weights[first]
      )
    # One program for all steps of the run reads as far as its last one.
    size = len(self.order.step_inputs(carry.state, first).kind)
    used = carry.cache.used
    assert used is not None
    if opens:
      used += (last - first) * size
    whole = carry.cache.replace(used=used - size)
    variables, cache = taken_apart(self.variables, whole, used)

    def body(carry: Carry, x: Any) -> tuple[Carry, Any]:
      k, start, weight = x
      new, log = self._step(carry, k, first, start, weight, variables)
      new = new.replace(cache=new.cache.replace(used=carry.cache.used))
      return new, (log if self.trace else None)

    carry, log = jax.lax.scan(body, carry.replace(cache=cache), xs)
    cache = joined(carry.cache, whole).replace(used=used)
    carry = carry.replace(cache=cache)
    return carry, jax.tree.map(_steps_in_a_row, log) if self.trace else None

  def xs(self, piece: Piece) -> tuple[Array, Array, Array]:
    """Number, first target and guidance weight of each step of a piece."""
    some = slice(piece.first, piece.last)
    return (
      jnp.arange(piece.first, piece.last),
      jnp.asarray(self.starts[some]),
      jnp.asarray(self.weights[some]),
    )

  def result(
    self, carry: Carry, count: int | Int[Array, ''] | None = None
  ) -> Generated:
    """Tokens so far.

    Args:
      carry: the last one.
      count: targets drawn; None is all.
    """
    state, done, latent = carry.state, None, carry.state.latent

    def laid(values: Array) -> Array:
      return self.order.tokens(state.replace(tokens=values))

    if count is not None:
      drawn = jnp.arange(self.order.num_targets) < count
      done = laid(jnp.broadcast_to(drawn, state.tokens.shape))
    if self.cfg.mean_code:
      latent = jax.vmap(laid, -1, -1)(latent)
      latent = latent.reshape(self.batch, *self.order.grid, -1)
    return Generated(laid(state.tokens), carry.bad, latent, done)

  def _guided_by(self, weight, logits):
    raw = logits.reshape(self.branches, self.batch, *logits.shape[1:])
    text, image = 1 + (self.scales[:2] - 1) * weight
    return guide(raw, self.cfg.guidance_mode, text, image), raw

  def _kept(self, state, start, size):
    assert self.known is not None
    cells = take_set(state.perm, start, size)
    return jnp.take_along_axis(self.known.keep, cells, axis=1)

  def _choose(self, state, logits, k, size, start, weight):
    guided, raw = self._guided_by(weight, logits)
    keys = sample_keys(self.seeds, k)
    # An argument of the program, where `cfg` only says whether it is 0.
    heated = guided / self.scales[2]
    tokens, bad = draw(heated, keys, self.cfg)
    if self.known is not None:
      old = take_set(state.tokens, start, size)
      tokens = jnp.where(self._kept(state, start, size), old, tokens)
    add = self.accumulate
    if self.forced is not None:
      tokens = take_set(self.forced, start, size)
    elif self.cfg.smooth and add is not None:
      progress = k / max(len(self.sizes) - 1, 1)
      soft = mixture(heated, keys, self.cfg, progress)
      tokens = jnp.argmax(soft, axis=-1).astype(jnp.int32)
      add = _adds(add, soft)
    state = self.order.write(state, k, tokens, add)
    if self.cfg.mean_code:
      warm = dataclasses.replace(self.cfg, temperature=1.0)  # also if greedy
      mean = self._codes(probabilities(heated, warm))
      if self.known is not None:
        kept = self._kept(state, start, size)[..., None]
        mean = jnp.where(kept, self._codes(tokens), mean)
      state = state.replace(latent=put_set(state.latent, mean, start))
    return state, bad, (guided, raw)

  def _codes(self, chosen):
    if self.accumulate is None:
      raise ValueError('mean_code=True with accumulate=None; it has the codes')
    return self.accumulate(0, None, chosen)[0]

  def _step(self, carry: Carry, k, like: int, start, weight, variables=None):
    size = self.sizes[like]
    inputs = self.order.step_inputs(carry.state, k, like)
    logits, cache = self.model.apply(
      variables or self.variables,
      _tiled(inputs, self.branches),
      carry.cache,
      carry.steered,
      size,
      method='decode',
    )
    state, bad, log = self._choose(carry.state, logits, k, size, start, weight)
    return carry.replace(state=state, cache=cache, bad=carry.bad | bad), log

  def _sort_by_confidence(self, carry: Carry, k: int) -> SampleState:
    order, state = self.order, carry.state
    left = order.num_targets - self.starts[k]
    inputs = _tiled(order.step_inputs(state, k, ahead=left), self.branches)
    seen = np.arange(len(inputs.kind)) < len(inputs.kind) - left
    logits, _ = self.model.apply(
      self.variables,
      inputs,
      carry.cache,
      carry.steered,
      last=left,
      key_valid=jnp.broadcast_to(seen, (self.batch * self.branches, len(seen))),
      method='decode',
    )
    guided, _ = self._guided_by(self.weights[k], logits)
    score = jnp.max(jax.nn.log_softmax(guided), axis=-1)
    keys = sample_keys(self.seeds, PERMUTATION - 1 - k)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (left,)))(keys)
    score += self.cfg.schedule_noise * left / order.num_targets * noise
    if self.known is not None:
      kept = self._kept(state, self.starts[k], left)
      score = jnp.where(kept, jnp.inf, score)
    return order.best_first(state, k, score)


def _copied(prefilled: Any, copies: int) -> Any:
  """Results of the prefill, each sample `copies` times in a row."""
  logits, cache, steered = prefilled

  def repeat(x: Any, axis: int = 0) -> Any:
    return None if x is None else jnp.repeat(x, copies, axis=axis)

  cache = cache.replace(
    k=repeat(cache.k, 1),
    v=repeat(cache.v, 1),
    valid=repeat(cache.valid),
    memory=jax.tree.map(repeat, cache.memory),
  )
  return repeat(logits), cache, jax.tree.map(repeat, steered)


def _steps_in_a_row(log: Float[Array, 'K ... n V']) -> Array:
  """Logits of a scan: [K, ..., n, V] -> [..., K * n, V]."""
  log = jnp.moveaxis(log, 0, -3)
  return log.reshape(*log.shape[:-3], -1, log.shape[-1])


def sample_keys(
  seeds: Int[Array, ' B'], stream: int | Array
) -> Key[Array, ' B']:
  """One key per sample: that of its seed, folded with the stream."""
  keys = jax.vmap(jax.random.key)(seeds)
  return jax.vmap(jax.random.fold_in, (0, None))(keys, stream)
