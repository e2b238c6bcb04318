"""The key-value cache of sampling.

In: keys and values of new positions, with their set ids. Out: those of all
positions in use, and their mask. The cache carries set ids, so one rule masks
training, prefill and decode (method 1.3, 9.1). Each layer writes its part, or
`stack.py` writes what all have made.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from scar_jax.orders.layout import set_mask
from scar_jax.sharding import logical_spec, platform

# Larger than any set id: nothing may attend to a slot that holds it.
UNWRITTEN = np.iinfo(np.int32).max
# Of all layers, or an array for each.
Slots = Float[Array, 'N B H K S'] | tuple[Float[Array, 'B H S K'], ...]


@struct.dataclass
class KVCache:
  """Keys and values of all layers, with what the mask needs.

  Attributes:
    k: [layers, B, H, K, S], after RoPE (or normalisation). Slots come last:
      TPUs fill the last axis up to 128, and K is mostly 64. Or, while many
      steps follow each other on a CPU, an array for each layer: see `apart`.
    v: [layers, B, H, K, S], or the same.
    set_ids: int32 [S]; slots not written yet hold `UNWRITTEN`.
    valid: bool [B, S], False at masked padding.
    length: int32, slots written.
    used: static bound on `length`, beyond which no slot is read; None reads
      all.
    memory: of `inject.Injector`, batch first; None where a prefix is used.
  """

  k: Slots
  v: Slots
  set_ids: Int[Array, ' S']
  valid: Bool[Array, 'B S']
  length: Int[Array, '']
  used: int | None = struct.field(pytree_node=False, default=None)
  memory: Any = None


def empty_cache(
  layers: int, batch: int, size: int, heads: int, head_dim: int, dtype: str
) -> KVCache:
  """A cache of `size` slots, none written."""
  shape = (layers, batch, heads, head_dim, size)
  return KVCache(
    k=jnp.zeros(shape, dtype),
    v=jnp.zeros(shape, dtype),
    set_ids=jnp.full((size,), UNWRITTEN, jnp.int32),
    valid=jnp.ones((batch, size), bool),
    length=jnp.zeros((), jnp.int32),
  )


def repeat_rows(cache: KVCache, count: int) -> KVCache:
  """The rows of a cache, the batch `count` times over."""
  if count == 1:
    return cache
  return cache.replace(
    k=jnp.concatenate([cache.k] * count, axis=1),
    v=jnp.concatenate([cache.v] * count, axis=1),
    valid=jnp.concatenate([cache.valid] * count),
  )


def cache_mask(
  cache: KVCache,
  set_ids: Int[Array, ' L'],
  key_valid: Bool[Array, 'B L'] | None,
) -> tuple[Bool[Array, 'B L used'], KVCache]:
  """Mask of L new positions over used slots, and the cache's bookkeeping.

  The new positions take the slots `cache.length ...`; their keys and values
  are written by the layers. Going past the last slot is the caller's mistake
  and cannot be seen under jit when the length is traced.

  Raises:
    ValueError: more new positions than slots.
  """
  count, size = len(set_ids), cache.set_ids.shape[0]
  if count > size:
    raise ValueError(
      f'{count} new positions do not fit a cache of {size} slots; '
      'accepted: a cache as long as the sequence (make_cache size)'
    )
  at = cache.length
  ids = jax.lax.dynamic_update_slice_in_dim(
    cache.set_ids, jnp.asarray(set_ids, jnp.int32), at, axis=0
  )
  valid = cache.valid
  if key_valid is not None:
    valid = jax.lax.dynamic_update_slice_in_dim(valid, key_valid, at, axis=1)
  used = None if cache.used is None else min(cache.used + count, size)
  mask = set_mask(set_ids, ids[:used], valid[:, :used], at)
  return mask, cache.replace(
    set_ids=ids, valid=valid, length=at + count, used=used
  )


def _slots_last(cache_kv: jax.Array) -> jax.Array:
  """Keeps the axes in this order in memory; compilers for TPUs may put K last.

  Tiles are 128 wide there, so heads of 64 channels would take, and every step
  read, twice as much.
  """
  if platform() != 'tpu':
    return cache_kv
  keep = functools.partial(
    with_layout_constraint, layouts=Layout(tuple(range(cache_kv.ndim)))
  )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return keep(cache_kv)
  # Of each device's own part: left alone, all parts are brought together.
  axes = (None, 'batch', 'act_heads', 'head_dim', None)
  spec = logical_spec(axes, cache_kv.shape, dict(mesh.shape))
  return jax.shard_map(keep, in_specs=(spec,), out_specs=spec)(cache_kv)


def apart(cache: KVCache, slots: int) -> KVCache:
  """With an array [B, H, S, K] for each layer, of the first slots only.

  A CPU copies what it slices, a layer out of a stack too; and it writes a slot
  faster whose channels lie together.
  """

  def layers(kv: Any) -> tuple[Array, ...]:
    return tuple(one[..., :slots].swapaxes(2, 3) for one in kv)

  return cache.replace(k=layers(cache.k), v=layers(cache.v))


def joined(cache: KVCache, like: KVCache) -> KVCache:
  """A cache with layers apart, as `like` was before; others as they are."""
  if not isinstance(cache.k, tuple):
    return cache

  def stack(layers: Any, old: Any) -> Array:
    start = (0,) * old.ndim
    new = jnp.stack(layers).swapaxes(3, 4)
    return jax.lax.dynamic_update_slice(old, new, start)

  return cache.replace(k=stack(cache.k, like.k), v=stack(cache.v, like.v))


def write_layer(
  kv: Float[Array, 'N B H K S'] | Float[Array, 'B H S K'],
  new: Float[Array, 'B L H K'],
  layer: Int[Array, ''],
  at: Int[Array, ''],
  used: int | None = None,
) -> tuple[Array, Float[Array, 'B H K used']]:
  """Writes one layer's new keys (or values), returns those in use.

  Args:
    kv: of all layers, or of this one alone (see `apart`).
    new: keys or values of L positions.
    layer: to write, if `kv` is of all.
    at: first slot to write.
    used: slots in use, the new ones last; None is all there are. L says that
      `at` is 0.
  """
  if kv.ndim == new.ndim:
    new = new.astype(kv.dtype).swapaxes(1, 2)
    kv = jax.lax.dynamic_update_slice(kv, new, (0, 0, at, 0))
    return kv, kv[:, :, :used].swapaxes(2, 3)
  new = _as_slots(new, kv)
  size = kv.shape[-1] if used is None else used
  kv = jax.lax.dynamic_update_slice(kv, new[None], (layer, 0, 0, 0, at))
  kv = _slots_last(kv)
  if size == new.shape[-1]:  # all there are
    return kv, new
  return kv, _slice_layer(kv, layer, size)


def read_layer(
  kv: Float[Array, 'N B H K S'],
  new: Float[Array, 'B L H K'],
  layer: Int[Array, ''],
  at: Int[Array, ''],
  used: int | None = None,
) -> tuple[Float[Array, 'B H K L'], Float[Array, 'B H K used']]:
  """`write_layer` that leaves the writing to `write_layers`.

  CPUs copy all of a cache, twice, that one loop over layers writes and reads.

  Returns:
    What to write, and keys (or values) in use.
  """
  new = _as_slots(new, kv)
  size = kv.shape[-1] if used is None else used
  if size == new.shape[-1]:
    return new, new
  one = _slice_layer(kv, layer, size)
  return new, jax.lax.dynamic_update_slice(one, new, (0, 0, 0, at))


def write_layers(
  kv: Float[Array, 'N B H K S'],
  new: Float[Array, 'N B H K L'],
  at: Int[Array, ''],
) -> Float[Array, 'N B H K S']:
  """What `read_layer` returned of all layers, into their cache."""
  return jax.lax.dynamic_update_slice(kv, new, (0, 0, 0, 0, at))


def _as_slots(new: Array, kv: Array) -> jax.Array:
  return new.astype(kv.dtype).transpose(0, 2, 3, 1)


def _slice_layer(kv: Array, layer: Array, size: int) -> jax.Array:
  # One slice, not a slice of a slice: TPUs then read it where it lies.
  sizes = (1, *kv.shape[1:-1], size)
  return jax.lax.dynamic_slice(kv, (layer, 0, 0, 0, 0), sizes)[0]
