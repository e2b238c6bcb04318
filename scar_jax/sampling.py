"""One cached sampler over sets, for every order and guidance.

In: a `Scar`, its variables, `Conditions` and one seed per sample. Out: target
tokens `[B, N]`, at once or as they grow. The steps are those of
`sampling_loop.py`. Used by `editor.py`, the tasks' pictures and evaluation.
Source: method 9.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scar_jax.filters import SamplerConfig, check_drawable
from scar_jax.models.conditions import Conditions
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.orders.random import Known
from scar_jax.orders.scale import Accumulate
from scar_jax.sampling_loop import Generated, Loop
from scar_jax.sampling_steps import (
  check_guidance,
  check_smooth,
  pieces,
  split_scales,
)
from scar_jax.types import PyTree


def generate(
  model: Scar,
  variables: PyTree,
  cond: Conditions,
  seeds: Int[Array, ' B'],
  scales: Float[Array, ' 3'],
  cfg: SamplerConfig,
  forced: Int[Array, 'B N'] | None = None,
  trace: bool = False,
  accumulate: Accumulate | None = None,
  known: Known | None = None,
  copies: int = 1,
) -> Generated:
  """Samples every set of the target; pure and traceable.

  With the schedule 'confidence' a first pass asks for all places that are left,
  each seen by itself alone, and its keys are thrown away. The step proper then
  draws afresh at the chosen places: whatever the choice, tokens come from the
  conditionals that the model was trained on.

  Args:
    model: the model.
    variables: its parameters.
    cond: conditions of B / copies samples.
    seeds: one integer per sample; sample i depends on nothing else that is
      random, so neither batch size nor place changes it.
    scales: guidance on text and image, and the temperature; of `cfg` only the
      mode counts, and whether the temperature is 0 (see `split_scales`).
    cfg: filters and guidance mode, static.
    forced: tokens in target order that replace the draws.
    trace: also return the logits.
    accumulate: of the multi-scale tokenizer, for the scale order.
    known: tokens to keep, for the random order.
    copies: that many samples in a row share a condition; what does not depend
      on the seed is then computed once for all of them.
  """
  loop = Loop(
    model, variables, seeds, scales, cfg, forced, trace, accumulate, known
  )
  carry, log = loop.begin(cond, copies)
  logs = [] if log is None else [log]
  for piece in pieces(loop.order, cfg):
    carry, log = loop.advance(carry, piece.run, True, loop.xs(piece))
    logs.append(log)
  made = loop.result(carry)
  if not trace:
    return made
  guided, raw = jax.tree.map(lambda *t: jnp.concatenate(t, axis=-2), *logs)
  return made._replace(guided=guided, raw=raw, perm=carry.state.perm)


class Sampler:
  """`generate`, compiled once for each shape and setting.

  Guidance strengths and temperature are arguments of the compiled function: a
  sweep over them compiles once. `compilations` counts how often it was traced.
  """

  def __init__(self, model: Scar, cfg: SamplerConfig):
    self.model, self.cfg, self.compilations = model, cfg, 0

    def traced(variables, cond, seeds, scales, forced, add, known, cfg, trace):
      self.compilations += 1
      return generate(
        model, variables, cond, seeds, scales, cfg, forced, trace, add, known
      )

    def begun(variables, cond, seeds, scales, add, known, cfg):
      self.compilations += 1
      return _loop(variables, seeds, scales, add, known, cfg).begin(cond)[0]

    def advanced(
      variables, carry, xs, count, seeds, scales, add, known, cfg, run, opens
    ):
      self.compilations += 1
      loop = _loop(variables, seeds, scales, add, known, cfg)
      carry, _ = loop.advance(carry, run, opens, xs)
      return carry, loop.result(carry, count)

    def _loop(variables, seeds, scales, add, known, cfg):
      return Loop(
        model, variables, seeds, scales, cfg, accumulate=add, known=known
      )

    self._run = jax.jit(traced, static_argnames=('cfg', 'trace'))
    self._begin = jax.jit(begun, static_argnames='cfg')
    self._advance = jax.jit(
      advanced,
      static_argnames=('cfg', 'run', 'opens'),
      donate_argnames='carry',
    )

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
    scales, static = self._settings(guidance, guidance_image)
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

  def stream(
    self,
    variables: PyTree,
    cond: Conditions,
    seeds: Int[Array, ' B'],
    guidance: float | None = None,
    guidance_image: float | None = None,
    accumulate: Accumulate | None = None,
    known: Known | None = None,
    temperature: float | None = None,
  ) -> Iterator[Generated]:
    """Targets as they grow: after each row, scale or set; the last has all.

    The same tokens as `run`, from as many programs as the order has shapes.
    Strengths and temperature may be overridden.

    Raises:
      ValueError: see `run`.
    """
    scales, cfg = self._settings(guidance, guidance_image, temperature)
    seeds = jnp.asarray(seeds, jnp.uint32)
    given = seeds, scales, accumulate, known
    # Only for its numbers, which are static.
    plan = Loop(self.model, variables, *given[:2], cfg, known=known)
    carry = self._begin(variables, cond, *given, cfg=cfg)
    for piece in pieces(plan.order, cfg, grow=True):
      carry, out = self._advance(
        variables,
        carry,
        plan.xs(piece),
        plan.starts[piece.last],
        *given,
        cfg=cfg,
        run=piece.run,
        opens=piece.opens,
      )
      check_drawable(out.bad)
      yield out

  def _settings(
    self,
    guidance: float | None,
    guidance_image: float | None,
    temperature: float | None = None,
  ) -> tuple[Float[Array, ' 3'], SamplerConfig]:
    given = {
      'guidance': guidance,
      'guidance_image': guidance_image,
      'temperature': temperature,
    }
    cfg = dataclasses.replace(
      self.cfg, **{k: float(v) for k, v in given.items() if v is not None}
    )
    scales, static = split_scales(cfg)
    check_guidance(self.model.cfg, static.guidance_mode)
    check_smooth(self.model.cfg, static)
    return scales, static

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


@functools.lru_cache(maxsize=32)
def make_sampler(cfg: ScarConfig, sampler: SamplerConfig) -> Sampler:
  """A shared compiled sampler of one model and setting."""
  return Sampler(Scar(cfg), sampler)
