"""The decoder's layers one after the other: in a loop, or written out.

In: the residual stream and what all layers share. Out: the stream after the
last layer, and the cache. Called by `decoder.py`. Files hold the layers stacked
in one array of each kind; training with layers written out, and samplers of
large models on CPUs, take them apart first.
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
LAYERS = 'layers'  # name of the stack, and of its first axis


def _name(layer: int) -> str:
  return f'layer_{layer}'


def layers_apart(params: PyTree) -> PyTree:
  """Parameters of a `Scar` with an array for each layer; boxes are kept.

  What is written out reads a layer where it is. Out of a stack it would copy it
  first, and put the gradients of all layers together again: CPUs spend 16 % of
  a training step of size L on that.
  """
  decoder = dict(params['decoder'])
  stacked = decoder.pop(LAYERS)
  axis = {nn.PARTITION_NAME: LAYERS}
  for i in range(len(jax.tree.leaves(stacked)[0])):
    one = jax.tree.map(lambda x, i=i: x[i], stacked)
    decoder[_name(i)] = nn.meta.remove_axis(one, 0, axis)
  return {**params, 'decoder': decoder}


def layers_stacked(params: PyTree) -> PyTree:
  """Unboxed parameters of a `Scar` as files have them: a stack of all layers.

  The other way of `layers_apart`; stacked ones stay as they are.
  """
  decoder = dict(params['decoder'])
  if LAYERS in decoder:
    return params
  layers = []
  while _name(len(layers)) in decoder:
    layers.append(decoder.pop(_name(len(layers))))
  decoder[LAYERS] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  return {**params, 'decoder': decoder}


def taken_apart(variables: PyTree) -> PyTree:
  """Variables of a `Scar`, for a loop of steps, with layers apart if faster.

  CPUs copy what a loop over stacked layers slices out of them, in every step
  of a sampler: 40 % of its time at size B.
  """
  stacked = variables['params']['decoder'].get(LAYERS)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stacked))
  if platform() != 'cpu' or size < _LARGE:
    return variables
  return {**variables, 'params': layers_apart(variables['params'])}


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
    block = rematerialised(block, cfg.remat, scan=False)
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
    metadata_params={nn.PARTITION_NAME: LAYERS},
  )
  carry, _ = stack(cfg, deterministic, kernel, name=LAYERS)(
    carry, jnp.arange(cfg.layers), path_rates, shared
  )
  return carry
