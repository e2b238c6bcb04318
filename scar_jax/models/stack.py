"""The decoder's layers one after the other: in a loop, or written out.

In: the residual stream and what all layers share. Out: the stream after the
last layer, and the cache. Called by `decoder.py`; `sampling_loop.py` takes
parameters apart for the second way.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.models.blocks import AdaLNBlock, Carry, LlamaBlock, Shared
from scar_jax.models.remat import rematerialised
from scar_jax.sharding import platform
from scar_jax.types import PyTree

# Layers smaller than this, all together, stay in the caches of a CPU.
_LARGE = 2**25  # bytes


def _name(layer: int) -> str:
  return f'layer_{layer}'


def taken_apart(variables: PyTree) -> PyTree:
  """Variables of a `Scar` with an array for each layer, where that is faster.

  CPUs copy what a loop over stacked layers slices out of them, in every step
  of a sampler: 40 % of its time at size B. Written out, and taken apart before
  the loop over steps, layers are read where they are.
  """
  decoder = dict(variables['params']['decoder'])
  stacked = decoder.pop('layers')
  leaves = jax.tree.leaves(stacked)
  size = sum(x.size * x.dtype.itemsize for x in leaves)
  if platform() != 'cpu' or size < _LARGE:
    return variables
  for i in range(len(leaves[0])):
    decoder[_name(i)] = jax.tree.map(lambda x, i=i: x[i], stacked)
  params = {**variables['params'], 'decoder': decoder}
  return {**variables, 'params': params}


def run_layers(
  decoder: nn.Module,
  carry: Carry,
  shared: Shared,
  deterministic: bool,
  kernel: Any,
) -> Carry:
  """All layers, as submodules of the decoder; from its compact method.

  Args:
    decoder: a `SetDecoder`.
    carry: what goes into the first layer.
    shared: what all read.
    deterministic: no dropout.
    kernel: of the attention, see `blocks.Attention`.
  """
  cfg: Any = decoder.cfg
  block = AdaLNBlock if cfg.block == 'adaln' else LlamaBlock
  rates = np.linspace(0, cfg.drop_path, cfg.layers, dtype=np.float32)
  path_rates = jnp.asarray(rates)
  if decoder.has_variable('params', _name(0)):
    for i in range(cfg.layers):
      layer = block(cfg, deterministic, kernel, name=_name(i))
      carry, _ = layer(carry, jnp.int32(i), path_rates[i], shared)
    return carry
  stack = nn.scan(
    rematerialised(block, cfg.remat, cfg.scan),
    variable_axes={'params': 0, 'intermediates': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=(0, 0, nn.broadcast),
    length=cfg.layers,
    unroll=1 if cfg.scan else cfg.layers,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  carry, _ = stack(cfg, deterministic, kernel, name='layers')(
    carry, jnp.arange(cfg.layers), path_rates, shared
  )
  return carry
