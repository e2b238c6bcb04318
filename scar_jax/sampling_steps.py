"""What a sampler can do with a model: its steps, and checks of its settings.

In: the configs of a model and of its sampler. Out: an order with the wanted
number of sets, runs of steps that one loop can serve, guidance strengths apart
from what shapes a program. Only the random order leaves a choice of steps: its
parameters know nothing of the number of sets. Called by `sampling.py`; the task
checks its settings here before it trains.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from scar_jax.filters import MIN_TEMPERATURE, SamplerConfig
from scar_jax.models.scar_config import ScarConfig
from scar_jax.orders.random import RandomOrder


def sampling_order(
  model: ScarConfig, cfg: SamplerConfig, given: int | None = None
) -> Any:
  """The model's order, with the steps that sampling takes.

  Args:
    model: of the model.
    cfg: of the sampler.
    given: tokens known before the first step; None without a mask.

  Raises:
    ValueError: a setting of the random order for a model of another one, or
      more steps than tokens.
  """
  order = model.make_order()
  if not isinstance(order, RandomOrder):
    for name, used, off in (
      ('sample.num_sets', cfg.num_sets, 0),
      ('sample.schedule', cfg.schedule, 'random'),
      ('mask', 'none' if given is None else 'given', 'none'),
    ):
      if used != off:
        raise ValueError(
          f'{name}={used!r} for a model of order {order.name!r}, whose steps '
          f'are fixed; accepted: {off!r}, or a model of the random order '
          '(train with --config.order.name=random)'
        )
    return order
  sets = cfg.num_sets or order.num_sets
  if sets > order.num_targets:
    raise ValueError(
      f'sample.num_sets={sets} for {order.num_targets} tokens; accepted: 1 to '
      f'{order.num_targets}, or 0, which is {order.num_sets} as trained '
      '(set --num_sets)'
    )
  return RandomOrder(order.grid, sets, given or 0)


def step_runs(order: Any, cfg: SamplerConfig) -> tuple[tuple[int, int], ...]:
  """Runs of the order; single steps where each looks at all that is left."""
  if cfg.schedule == 'random':
    return order.runs
  first, last = order.runs[0][0], order.runs[-1][1]
  return tuple((k, k + 1) for k in range(first, last))


class Piece(NamedTuple):
  """Steps that are done by one program.

  Attributes:
    run: [first, last) steps of one shape, these among them.
    first: first step of the piece.
    last: one past its last step.
  """

  run: tuple[int, int]
  first: int
  last: int

  @property
  def opens(self) -> bool:
    """Whether it is the first of its run."""
    return self.first == self.run[0]


def pieces(
  order: Any, cfg: SamplerConfig, grow: bool = False
) -> tuple[Piece, ...]:
  """All steps that have inputs, in pieces.

  Args:
    order: see `sampling_order`.
    cfg: of the sampler.
    grow: cut long runs, so that a picture is seen to grow: the raster order
      after every row, the random order about 16 times.
  """
  runs = step_runs(order, cfg)
  if not grow:
    return tuple(Piece(run, *run) for run in runs)
  steps = len(order.set_sizes)
  every = order.grid[1] if order.name == 'raster' else -(-steps // 16)
  found = []
  for first, last in runs:
    ends = [*range(first // every * every + every, last, every), last]
    for start, end in zip([first, *ends], ends, strict=False):
      found.append(Piece((first, last), start, end))
  return tuple(found)


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
    ValueError: `smooth` with an order whose inputs are tokens, `mean_code` with
      the one whose inputs are not.
  """
  if cfg.mean_code and model.order == 'scale':
    raise ValueError(
      "sample.mean_code=True with order 'scale', whose latent is a sum over "
      'scales; accepted: raster or random, or sample.smooth=True '
      '(set --config.sample.mean_code=False)'
    )
  if cfg.smooth and model.order != 'scale':
    raise ValueError(
      f'sample.smooth=True with order {model.order!r}, which goes on from '
      "tokens; accepted: the order 'scale' (set --config.sample.smooth=False)"
    )


def split_scales(
  cfg: SamplerConfig,
) -> tuple[Float[Array, ' 3'], SamplerConfig]:
  """Guidance on text and image and temperature; what shapes a program.

  A temperature of 0, which draws nothing, is a program of its own. Where the
  strengths say that guidance is off, so does the mode: no null branch is
  computed.
  """
  drawn = cfg.temperature > 0
  heat = max(cfg.temperature, MIN_TEMPERATURE) if drawn else 1.0
  scales = jnp.asarray([cfg.guidance, cfg.guidance_image, heat], jnp.float32)
  mode = cfg.guidance_mode
  off = cfg.guidance == 1 and (mode != 'image_text' or cfg.guidance_image == 1)
  static = dataclasses.replace(
    cfg,
    guidance_mode='none' if off else mode,
    guidance=1.0,
    guidance_image=1.0,
    temperature=1.0 if drawn else 0.0,
  )
  return scales, static
