"""Orders: how a target is cut into sets, and the layout of a sequence."""

from scar_jax.orders.layout import (
  Inputs,
  Layout,
  Order,
  SampleState,
  make_layout,
  set_mask,
)
from scar_jax.orders.random import (
  Known,
  RandomOrder,
  cosine_sizes,
  given_tokens,
)
from scar_jax.orders.raster import RasterOrder
from scar_jax.orders.scale import PATCH_NUMS, ScaleOrder

ORDERS = ('raster', 'scale', 'random')

__all__ = [
  'ORDERS',
  'PATCH_NUMS',
  'Inputs',
  'Known',
  'Layout',
  'Order',
  'RandomOrder',
  'RasterOrder',
  'SampleState',
  'ScaleOrder',
  'cosine_sizes',
  'given_tokens',
  'make_layout',
  'make_order',
  'set_mask',
]


def make_order(
  name: str,
  grid: tuple[int, int],
  num_sets: int = 16,
  patch_nums: tuple[int, ...] | None = None,
) -> Order:
  """The order of a name.

  Args:
    name: a value of `ORDERS`.
    grid: (h, w) of the target tokens.
    num_sets: sets of the random order.
    patch_nums: sides of the scale order, the last is the grid's.

  Raises:
    ValueError: an unknown name, or scales that do not end in the grid.
  """
  if name == 'raster':
    return RasterOrder(grid)
  if name == 'random':
    return RandomOrder(grid, num_sets)
  if name != 'scale':
    raise ValueError(
      f'order.name={name!r}; accepted: {", ".join(ORDERS)} '
      '(set --config.order.name)'
    )
  sides = tuple(patch_nums or PATCH_NUMS[256])
  if (sides[-1], sides[-1]) != tuple(grid):
    raise ValueError(
      f'patch_nums={sides} for a token grid of {grid}; accepted: square '
      'grids, the last scale as large as the grid '
      '(set --config.model.patch_nums of the tokenizer)'
    )
  return ScaleOrder(sides)
