"""The decoder's layers one after the other: in a loop, or written out.

In: the residual stream and what all layers share. Out: the stream after the
last layer, and the cache. Called by `decoder.py`. Training with layers written
out, and samplers of large models on CPUs, first take parameters apart.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.models.blocks import AdaLNBlock, Carry, LlamaBlock, Shared
from scar_jax.models.cache import KVCache, apart, write_layers
from scar_jax.models.remat import rematerialised
from scar_jax.models.unstacked import (
  LAYERS,
  as_read_fastest,
  layer_name,
  restack,
  unstack,
)
from scar_jax.sharding import platform
from scar_jax.types import PyTree

# New values of a step from which on a CPU copies a cache that its layers write
# and read; for fewer it is faster, and takes less memory, to write. Seen from
# 130,000 (64 channels) or 390,000 (768) on.
_MANY = 2**18


def layers_apart(params: PyTree) -> PyTree:
  """Parameters of a `Scar` with an array for each layer of its decoder.

  CPUs spend 8 % less time on a training step of size L then.
  """
  return {**params, 'decoder': unstack(params['decoder'])}


def layers_stacked(params: PyTree) -> PyTree:
  """Unboxed parameters of a `Scar` as files have them."""
  return {**params, 'decoder': restack(params['decoder'])}


def taken_apart(
  variables: PyTree, cache: KVCache, slots: int
) -> tuple[PyTree, KVCache]:
  """A `Scar` and its cache, for a loop of steps, with layers apart if faster.

  CPUs would copy them in every step of a sampler: 40 % of its time at size B.

  Args:
    variables: of the model.
    cache: what the loop starts from.
    slots: of the cache that the loop reaches.
  """
  params = variables['params']
  decoder = as_read_fastest(params['decoder'])
  if layer_name(0) in decoder:
    cache = apart(cache, slots)
  return {**variables, 'params': {**params, 'decoder': decoder}}, cache


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
  at, cached = shared.at, (carry.k, carry.v)
  past = at is not None and not isinstance(carry.k, tuple)
  if past := past and platform() == 'cpu' and carry.x.size > _MANY:
    shared = shared._replace(past=cached)
    carry = Carry(carry.x, None, None)
  carry, new = _through(decoder, carry, shared, deterministic, kernel)
  if past:
    k, v = (write_layers(*pair, at) for pair in zip(cached, new, strict=True))
    carry = Carry(carry.x, k, v)
  return carry


def _through(
  decoder: nn.Module,
  carry: Carry,
  shared: Shared,
  deterministic: bool,
  kernel: Any,
) -> tuple[Carry, Any]:
  """The carry, and what layers return beside it, stacked."""
  cfg: Any = decoder.cfg
  block = AdaLNBlock if cfg.block == 'adaln' else LlamaBlock
  rates = np.linspace(0, cfg.drop_path, cfg.layers, dtype=np.float32)
  path_rates = jnp.asarray(rates)
  if decoder.has_variable('params', layer_name(0)):
    block = rematerialised(block, cfg.remat, scan=False)
    own, found = isinstance(carry.k, tuple), []
    k, v = carry.k, carry.v
    for i in range(cfg.layers):
      if own:
        carry = Carry(carry.x, k[i], v[i])
      layer = block(cfg, deterministic, kernel, name=layer_name(i))
      carry, new = layer(carry, jnp.int32(i), path_rates[i], shared)
      found.append((carry.k, carry.v) if own else new)
    if own:
      return Carry(carry.x, *zip(*found, strict=True)), None
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *found)
  stack = nn.scan(
    rematerialised(block, cfg.remat, cfg.scan),
    variable_axes={'params': 0, 'intermediates': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=(0, 0, nn.broadcast),
    length=cfg.layers,
    unroll=1 if cfg.scan else cfg.layers,
    metadata_params={nn.PARTITION_NAME: LAYERS},
  )
  return stack(cfg, deterministic, kernel, name=LAYERS)(
    carry, jnp.arange(cfg.layers), path_rates, shared
  )
