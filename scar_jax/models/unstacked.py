"""Parameters of layers: stacked in one array of each kind, or one by one.

In and out: parameters of a module that holds its layers under `layers`, the
first axis of each array, or under `layer_0`, `layer_1`, ... Files have them
stacked, and `nn.scan` loops over that. What is written out reads a layer where
it is when they are apart; out of a stack it is copied first, and gradients of
all layers are put together again.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from scar_jax.models.dense import outputs_first
from scar_jax.sharding import platform
from scar_jax.types import PyTree

LAYERS = 'layers'  # name of the stack, and of its first axis
# Parameters smaller than this, all together, stay in the caches of a CPU.
_LARGE = 2**25  # bytes


def layer_name(i: int) -> str:
  """Of layer i, from 0, that is not in a stack."""
  return f'layer_{i}'


def unstack(params: PyTree) -> PyTree:
  """With an array for each layer; boxes are kept, less the axis of layers.

  What has no stack stays as it is.
  """
  if LAYERS not in params:
    return params
  rest = dict(params)
  stacked = rest.pop(LAYERS)
  axis = {nn.PARTITION_NAME: LAYERS}
  for i in range(len(jax.tree.leaves(stacked)[0])):
    one = jax.tree.map(lambda x, i=i: x[i], stacked)
    rest[layer_name(i)] = nn.meta.remove_axis(one, 0, axis)
  return rest


def restack(params: PyTree) -> PyTree:
  """The other way, of unboxed ones; stacked ones stay as they are."""
  if LAYERS in params:
    return params
  rest, layers = dict(params), []
  while layer_name(len(layers)) in rest:
    layers.append(rest.pop(layer_name(len(layers))))
  return {**rest, LAYERS: jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def is_large(params: PyTree) -> bool:
  """Whether a CPU reads parameters from its memory again in every step."""
  leaves = jax.tree.leaves(params)
  return sum(x.size * x.dtype.itemsize for x in leaves) >= _LARGE


def as_read_fastest(params: PyTree, turn: bool = False) -> PyTree:
  """With layers apart on CPUs where they are large; else as they are.

  What a CPU slices out of a stack it copies.

  Args:
    params: see above.
    turn: kernels of these layers come with their outputs first, for a network
      that always has many rows and no gradients, see `dense.outputs_first`.
  """
  if platform() != 'cpu' or LAYERS not in params:
    return params
  if not is_large(params[LAYERS]):
    return params
  rest = dict(params)
  layers = unstack({LAYERS: rest.pop(LAYERS)})
  return {**rest, **(outputs_first(layers) if turn else layers)}
