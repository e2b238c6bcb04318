"""One cached sampler over sets, for every order and guidance.

In: a `Scar`, its variables, `Conditions` and one seed per sample. Out: target
tokens `[B, N]`. Set 0 is prefilled for all guidance branches stacked along the
batch; uniform orders then scan over steps, others are unrolled. Used by
`editor.py`, the tasks' pictures and evaluation. Source: method 9.
"""

import dataclasses
import functools
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
from scar_jax.models.scar import Conditions, Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.orders.layout import Inputs
from scar_jax.orders.scale import Accumulate
from scar_jax.types import PyTree

# Which part of the conditions each branch loses: (text, prefix).
_BRANCHES = {
  'none': ((False, False),),
  'text': ((False, False), (True, False)),
  'image': ((False, False), (False, True)),
  'image_text': ((False, False), (True, False), (True, True)),
}
# Stream of the permutations; the draw of step k takes stream k.
PERMUTATION = 2**31 - 1


class Generated(NamedTuple):
  """What `generate` returns.

  Attributes:
    tokens: finished targets, row-major.
    bad: samples whose logits no draw was possible from.
    latent: sum of the codes (scale order); with `smooth` no tokens have it.
    guided: guided logits in target order, only with `trace`.
    raw: logits of every branch, the conditional one first, with `trace`.
  """

  tokens: Int[Array, 'B N']
  bad: Bool[Array, ' B']
  latent: Float[Array, 'B h w C'] | None = None
  guided: Float[Array, 'B N V'] | None = None
  raw: Float[Array, 'G B N V'] | None = None


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
) -> Generated:
  """Samples every set of the target; pure and traceable.

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
  """
  order, layout = model.cfg.make_order(), model.cfg.make_layout()
  batch, branches = seeds.shape[0], len(_BRANCHES[cfg.guidance_mode])
  sizes = order.set_sizes
  starts = np.concatenate([[0], np.cumsum(sizes)])
  weights = ramp_weights(sizes, cfg)

  def choose(state, logits, k, size, start, weight):
    raw = logits.reshape(branches, batch, *logits.shape[1:])
    text, image = 1 + (scales - 1) * weight
    guided = guide(raw, cfg.guidance_mode, text, image)
    tokens, bad = draw(guided, sample_keys(seeds, k), cfg)
    add = accumulate
    if forced is not None:
      tokens = jax.lax.dynamic_slice_in_dim(forced, start, size, axis=1)
    elif cfg.smooth and accumulate is not None:
      soft = mixture(
        guided, sample_keys(seeds, k), cfg, k / max(len(sizes) - 1, 1)
      )
      tokens = jnp.argmax(soft, axis=-1).astype(jnp.int32)
      add = _adds(accumulate, soft)
    return order.write(state, k, tokens, add), bad, (guided, raw)

  def step(state, cache, k, size, start, weight):
    inputs = _tiled(order.step_inputs(state, k), branches)
    logits, cache = model.apply(
      variables, inputs, cache, vector, method='decode'
    )
    logits = logits[:, order.logit_slots(k if isinstance(k, int) else 1)]
    state, bad, logs = choose(state, logits, k, size, start, weight)
    return state, cache, bad, logs

  stacked = stack_branches(cond, cfg.guidance_mode)
  prefilled: Any = model.apply(
    variables,
    stacked,
    cache_size(layout.length),
    method='prefill',
  )
  logits, cache, vector = prefilled
  state = order.start(batch, sample_keys(seeds, PERMUTATION))
  logs, bad, first = [], jnp.zeros(batch, bool), 0
  if order.from_prefix:
    state, bad, log = choose(state, logits, 0, sizes[0], 0, weights[0])
    logs.append(log)
    first = 1
  if order.uniform and len(sizes) > first:

    def body(carry, x):
      state, cache, bad = carry
      k, weight = x
      state, cache, new, log = step(state, cache, k, 1, k, weight)
      return (state, cache, bad | new), (log if trace else None)

    steps = jnp.arange(first, len(sizes))
    carry, log = jax.lax.scan(
      body, (state, cache, bad), (steps, jnp.asarray(weights[first:]))
    )
    state, cache, bad = carry
    if trace:  # [steps, B, 1, V] -> [B, steps, V]
      logs.append(
        jax.tree.map(lambda t: jnp.moveaxis(t[..., 0, :], 0, -2), log)
      )
  elif not order.uniform:
    for k in range(first, len(sizes)):
      state, cache, new, log = step(
        state, cache, k, sizes[k], int(starts[k]), weights[k]
      )
      bad = bad | new
      logs.append(log)
  tokens = order.tokens(state)
  if not trace:
    return Generated(tokens, bad, state.latent)
  guided, raw = jax.tree.map(lambda *t: jnp.concatenate(t, axis=-2), *logs)
  return Generated(tokens, bad, state.latent, guided, raw)


def sample_keys(
  seeds: Int[Array, ' B'], stream: int | Array
) -> Key[Array, ' B']:
  """One key per sample: that of its seed, folded with the stream."""
  keys = jax.vmap(jax.random.key)(seeds)
  return jax.vmap(jax.random.fold_in, (0, None))(keys, stream)


def check_guidance(model: ScarConfig, mode: str) -> None:
  """Raises where the model has not learned the null condition of a mode.

  Raises:
    ValueError: names the mode and the ones this model has.
  """
  accepted = ['none']
  if model.text.kind != 'none':
    accepted.append('text')
  if model.has_null_prefix:
    accepted.append('image')
  if len(accepted) == 3:
    accepted.append('image_text')
  if mode not in accepted:
    raise ValueError(
      f'sample.guidance_mode={mode!r} needs null conditions that this model '
      f'does not have; accepted: {", ".join(accepted)} (train with '
      '--config.model.cond_dropout=joint, or set sample.guidance_mode)'
    )


def check_smooth(model: ScarConfig, cfg: SamplerConfig) -> None:
  """Raises where a mixture of codes has no place to go.

  Raises:
    ValueError: `smooth` with an order whose inputs are tokens.
  """
  if cfg.smooth and model.order != 'scale':
    raise ValueError(
      f'sample.smooth=True with order {model.order!r}, which goes on from '
      "tokens; accepted: the order 'scale' (set --config.sample.smooth=False)"
    )


def split_scales(
  cfg: SamplerConfig,
) -> tuple[Float[Array, ' 2'], SamplerConfig]:
  """Guidance strengths (text, image), and the settings that shape a program.

  Where the strengths say that guidance is off, so does the mode: no null
  branch is computed.
  """
  scales = jnp.asarray([cfg.guidance, cfg.guidance_image], jnp.float32)
  mode = cfg.guidance_mode
  off = cfg.guidance == 1 and (mode != 'image_text' or cfg.guidance_image == 1)
  static = dataclasses.replace(
    cfg,
    guidance_mode='none' if off else mode,
    guidance=1.0,
    guidance_image=1.0,
  )
  return scales, static


class Sampler:
  """`generate`, compiled once for each shape and setting.

  Guidance strengths are arguments of the compiled function: a sweep over them
  compiles once. `compilations` counts how often it was traced.
  """

  def __init__(self, model: Scar, cfg: SamplerConfig):
    self.model, self.cfg, self.compilations = model, cfg, 0

    def traced(variables, cond, seeds, scales, forced, add, cfg, trace):
      self.compilations += 1
      return generate(
        model, variables, cond, seeds, scales, cfg, forced, trace, add
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
  ) -> Int[Array, 'B N']:
    """Target tokens, row-major."""
    return self.run(
      variables,
      cond,
      seeds,
      guidance,
      guidance_image,
      accumulate=accumulate,
    ).tokens


@functools.lru_cache(maxsize=8)
def make_sampler(cfg: ScarConfig, sampler: SamplerConfig) -> Sampler:
  """A shared compiled sampler of one model and setting."""
  return Sampler(Scar(cfg), sampler)
