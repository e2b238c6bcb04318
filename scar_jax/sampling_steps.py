"""Which steps a sampler takes: those of the model's order, or others.

In: the configs of a model and of its sampler. Out: an order with the wanted
number of sets, and runs of steps that one loop can serve. Only the random order
leaves a choice: its parameters know nothing of the number of sets. Called by
`sampling.py`; the task checks its settings here before it trains.
"""

from typing import Any

from scar_jax.filters import SamplerConfig
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
