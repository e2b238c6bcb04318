"""The decoder's layers one after the other: in a loop, or written out.

In: the residual stream and what all layers share. Out: the stream after the
last layer, and the cache. Called by `decoder.py`. Training with layers written
out, and samplers of large models on CPUs, first take parameters apart.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from scar_jax.models.blocks import AdaLNBlock, Carry, LlamaBlock, Shared
from scar_jax.models.remat import rematerialised
from scar_jax.models.unstacked import (
  LAYERS,
  as_read_fastest,
  layer_name,
  restack,
  unstack,
)
from scar_jax.types import PyTree


def layers_apart(params: PyTree) -> PyTree:
  """Parameters of a `Scar` with an array for each layer of its decoder.

  CPUs spend 8 % less time on a training step of size L then.
  """
  return {**params, 'decoder': unstack(params['decoder'])}


def layers_stacked(params: PyTree) -> PyTree:
  """Unboxed parameters of a `Scar` as files have them."""
  return {**params, 'decoder': restack(params['decoder'])}


def taken_apart(variables: PyTree) -> PyTree:
  """Variables of a `Scar`, for a loop of steps, with layers apart if faster.

  CPUs would copy them in every step of a sampler: 40 % of its time at size B.
  """
  params = variables['params']
  decoder = as_read_fastest(params['decoder'])
  return {**variables, 'params': {**params, 'decoder': decoder}}


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
  if decoder.has_variable('params', layer_name(0)):
    block = rematerialised(block, cfg.remat, scan=False)
    for i in range(cfg.layers):
      layer = block(cfg, deterministic, kernel, name=layer_name(i))
      carry, _ = layer(carry, jnp.int32(i), path_rates[i], shared)
    return carry
  stack = nn.scan(
    rematerialised(block, cfg.remat, cfg.scan),
    variable_axes={'params': 0, 'intermediates': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=(0, 0, nn.broadcast),
    length=cfg.layers,
    unroll=1 if cfg.scan else cfg.layers,
    metadata_params={nn.PARTITION_NAME: LAYERS},
  )
  carry, _ = stack(cfg, deterministic, kernel, name=LAYERS)(
    carry, jnp.arange(cfg.layers), path_rates, shared
  )
  return carry
