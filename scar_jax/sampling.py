"""One cached sampler over sets, for every order and guidance.

In: a `Scar`, its variables, `Conditions` and one seed per sample. Out: target
tokens `[B, N]`. Set 0 is prefilled for all guidance branches stacked along the
batch; runs of steps of one shape are scanned, the others unrolled. Used by
`editor.py`, the tasks' pictures and evaluation. Source: method 9.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from scar_jax.filters import (
  SamplerConfig,
  check_drawable,
  draw,
  guide,
  mixture,
  ramp_weights,
)
from scar_jax.models.conditions import Conditions
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.orders.layout import Inputs, take_set
from scar_jax.orders.random import Known
from scar_jax.orders.scale import Accumulate
from scar_jax.sampling_steps import (
  check_guidance,
  check_smooth,
  sampling_order,
  split_scales,
  step_runs,
)
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
    latent: sum of the codes (scale order); with `smooth` no tokens have it.
    guided: guided logits in target order, only with `trace`.
    raw: logits of every branch, the conditional one first, with `trace`.
    perm: grid index of each target (random order), with `trace`.
  """

  tokens: Int[Array, 'B N']
  bad: Bool[Array, ' B']
  latent: Float[Array, 'B h w C'] | None = None
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
  unit = 128 if length > 128 else 16
  return -(-length // unit) * unit


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


def generate(
  model: Scar,
  variables: PyTree,
  cond: Conditions,
  seeds: Int[Array, ' B'],
  scales: Float[Array, ' 2'],
  cfg: SamplerConfig,
  forced: Int[Array, 'B N'] | None = None,
  trace: bool = False,
  accumulate: Accumulate | None = None,
  known: Known | None = None,
) -> Generated:
  """Samples every set of the target; pure and traceable.

  With the schedule 'confidence' a first pass asks for all places that are left,
  each seen by itself alone, and its keys are thrown away. The step proper then
  draws afresh at the chosen places: whatever the choice, tokens come from the
  conditionals that the model was trained on.

  Args:
    model: the model.
    variables: its parameters.
    cond: conditions of B samples.
    seeds: one integer per sample; sample i depends on nothing else that is
      random, so neither batch size nor place changes it.
    scales: guidance on (text, image); `cfg` has the mode, not the strength.
    cfg: filters and guidance mode, static.
    forced: tokens in target order that replace the draws.
    trace: also return the logits.
    accumulate: of the multi-scale tokenizer, for the scale order.
    known: tokens to keep, for the random order.
  """
  order = sampling_order(model.cfg, cfg, known.given if known else None)
  length = model.cfg.make_layout().set0_len + order.input_len
  batch, branches = seeds.shape[0], branch_count(cfg.guidance_mode)
  sizes = order.set_sizes
  starts = [0, *itertools.accumulate(sizes)]
  weights = ramp_weights(sizes, cfg)

  def guided_by(weight, logits):
    raw = logits.reshape(branches, batch, *logits.shape[1:])
    text, image = 1 + (scales - 1) * weight
    return guide(raw, cfg.guidance_mode, text, image), raw

  def kept(state, start, size):
    assert known is not None
    cells = take_set(state.perm, start, size)
    return jnp.take_along_axis(known.keep, cells, axis=1)

  def choose(state, logits, k, size, start, weight):
    guided, raw = guided_by(weight, logits)
    tokens, bad = draw(guided, sample_keys(seeds, k), cfg)
    if known is not None:
      old = take_set(state.tokens, start, size)
      tokens = jnp.where(kept(state, start, size), old, tokens)
    add = accumulate
    if forced is not None:
      tokens = take_set(forced, start, size)
    elif cfg.smooth and accumulate is not None:
      soft = mixture(
        guided, sample_keys(seeds, k), cfg, k / max(len(sizes) - 1, 1)
      )
      tokens = jnp.argmax(soft, axis=-1).astype(jnp.int32)
      add = _adds(accumulate, soft)
    return order.write(state, k, tokens, add), bad, (guided, raw)

  def step(state, cache, k, like, start, weight):
    inputs = _tiled(order.step_inputs(state, k, like), branches)
    logits, cache = model.apply(
      variables, inputs, cache, vector, sizes[like], method='decode'
    )
    state, bad, logs = choose(state, logits, k, sizes[like], start, weight)
    return state, cache, bad, logs

  def sort_by_confidence(state, cache, k):
    left = order.num_targets - starts[k]
    inputs = _tiled(order.step_inputs(state, k, ahead=left), branches)
    seen = np.arange(len(inputs.kind)) < len(inputs.kind) - left
    logits, _ = model.apply(
      variables,
      inputs,
      cache,
      vector,
      last=left,
      key_valid=jnp.broadcast_to(seen, (batch * branches, len(seen))),
      method='decode',
    )
    guided, _ = guided_by(weights[k], logits)
    score = jnp.max(jax.nn.log_softmax(guided), axis=-1)
    keys = sample_keys(seeds, PERMUTATION - 1 - k)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (left,)))(keys)
    score += cfg.schedule_noise * left / order.num_targets * noise
    if known is not None:
      score = jnp.where(kept(state, starts[k], left), jnp.inf, score)
    return order.best_first(state, k, score)

  stacked = stack_branches(cond, cfg.guidance_mode)
  one = model.cfg.one_prefix and cfg.guidance_mode == 'text'
  prefilled: Any = model.apply(
    variables,
    stacked,
    cache_size(length),
    branches if one else 1,
    method='prefill',
  )
  logits, cache, vector = prefilled
  cache = cache.replace(used=length - order.input_len)
  state = order.start(batch, sample_keys(seeds, PERMUTATION))
  if known is not None:
    state = order.known_first(state, known)
  logs, bad = [], jnp.zeros(batch, bool)
  if order.from_prefix:
    state, bad, log = choose(state, logits, 0, sizes[0], 0, weights[0])
    logs.append(log)
  for first, last in step_runs(order, cfg):
    if last - first == 1:
      if cfg.schedule == 'confidence' and last < len(sizes):
        state = sort_by_confidence(state, cache, first)
      state, cache, new, log = step(
        state, cache, first, first, starts[first], weights[first]
      )
      bad = bad | new
      logs.append(log)
      continue

    # One program for all steps of the run reads as far as its last one.
    size = len(order.step_inputs(state, first).kind)
    used = cache.used + (last - first) * size
    cache = cache.replace(used=used - size)

    def body(carry, x, first=first):
      state, cache, bad = carry
      k, start, weight = x
      state, new_cache, new, log = step(state, cache, k, first, start, weight)
      cache = new_cache.replace(used=cache.used)
      return (state, cache, bad | new), (log if trace else None)

    xs = (
      jnp.arange(first, last),
      jnp.asarray(starts[first:last]),
      jnp.asarray(weights[first:last]),
    )
    (state, cache, bad), log = jax.lax.scan(body, (state, cache, bad), xs)
    cache = cache.replace(used=used)
    if trace:
      logs.append(jax.tree.map(_steps_in_a_row, log))
  tokens = order.tokens(state)
  if not trace:
    return Generated(tokens, bad, state.latent)
  guided, raw = jax.tree.map(lambda *t: jnp.concatenate(t, axis=-2), *logs)
  return Generated(tokens, bad, state.latent, guided, raw, state.perm)


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


class Sampler:
  """`generate`, compiled once for each shape and setting.

  Guidance strengths are arguments of the compiled function: a sweep over them
  compiles once. `compilations` counts how often it was traced.
  """

  def __init__(self, model: Scar, cfg: SamplerConfig):
    self.model, self.cfg, self.compilations = model, cfg, 0

    def traced(variables, cond, seeds, scales, forced, add, known, cfg, trace):
      self.compilations += 1
      return generate(
        model, variables, cond, seeds, scales, cfg, forced, trace, add, known
      )

    self._run = jax.jit(traced, static_argnames=('cfg', 'trace'))

  def run(
    self,
    variables: PyTree,
    cond: Conditions,
    seeds: Int[Array, ' B'],
    guidance: float | None = None,
    guidance_image: float | None = None,
    forced: Int[Array, 'B N'] | None = None,
    trace: bool = False,
    accumulate: Accumulate | None = None,
    known: Known | None = None,
  ) -> Generated:
    """`generate` with this sampler's config; scales may be overridden.

    Raises:
      ValueError: settings that the model cannot do, or undrawable logits.
    """
    given = {'guidance': guidance, 'guidance_image': guidance_image}
    cfg = dataclasses.replace(
      self.cfg, **{k: float(v) for k, v in given.items() if v is not None}
    )
    scales, static = split_scales(cfg)
    check_guidance(self.model.cfg, static.guidance_mode)
    check_smooth(self.model.cfg, static)
    out = self._run(
      variables,
      cond,
      jnp.asarray(seeds, jnp.uint32),
      scales,
      forced,
      accumulate,
      known,
      cfg=static,
      trace=trace,
    )
    check_drawable(out.bad)
    return out

  def __call__(
    self,
    variables: PyTree,
    cond: Conditions,
    seeds: Int[Array, ' B'],
    guidance: float | None = None,
    guidance_image: float | None = None,
    accumulate: Accumulate | None = None,
    known: Known | None = None,
  ) -> Int[Array, 'B N']:
    """Target tokens, row-major."""
    return self.run(
      variables,
      cond,
      seeds,
      guidance,
      guidance_image,
      accumulate=accumulate,
      known=known,
    ).tokens


@functools.lru_cache(maxsize=8)
def make_sampler(cfg: ScarConfig, sampler: SamplerConfig) -> Sampler:
  """A shared compiled sampler of one model and setting."""
  return Sampler(Scar(cfg), sampler)
