"""Flash attention under a set mask: Pallas splash (TPU) and cuDNN (GPU).

In: q, k, v `[B, L, H, K]` of one whole sequence, its static set ids, and which
keys are padding. Out: `[B, L, H, K]`, equal to `attention.attend` under
`set_mask`; no `[L, L]` array is kept for the backward pass. Called by
`models/blocks.py`; `attention.choose_backend` decides. Source: JAX's
`pallas.ops.tpu.splash_attention` and `jax.nn.dot_product_attention`.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models.attention import attend
from scar_jax.models.remat import ATTENTION
from scar_jax.orders.layout import set_mask
from scar_jax.sharding import mapped, platform

# Rows and columns of a tile: as large as fits the vector memory with room for
# both backward kernels, in multiples of the 128 lanes.
_TILES = (512, 384, 256)


def tiles(length: int) -> tuple[int, int]:
  """(tile, padded length) of a sequence: the least padding, then large tiles.

  1399 positions of a 512 px picture become 3 tiles of 512, 744 of a scale
  order 2 of 384.
  """
  if length <= 128:
    return 128, 128
  padded = {tile: -(-length // tile) * tile for tile in _TILES}
  tile = min(_TILES, key=lambda t: padded[t])
  return tile, padded[tile]


def _sees(q_end: Any, key: Any) -> Any:
  return q_end >= key


class SetCausalMask(splash.Mask):
  """`set_ids[q] >= set_ids[k]`, computed in the kernel, never loaded.

  Set ids never fall along a sequence, so that a query sees just the keys up to
  the last one of its set. Padding at the end is a set of its own.
  """

  mask_function = staticmethod(_sees)

  def __init__(self, set_ids: Int[np.ndarray, ' L'], size: int):
    ends = np.searchsorted(set_ids, set_ids, side='right') - 1
    rest = np.full(size - len(set_ids), size - 1)
    self.q_sequence = np.concatenate([ends, rest]).astype(np.int32)

  @property
  def shape(self) -> tuple[int, int]:
    """(L, L), padded."""
    return (len(self.q_sequence),) * 2

  def __getitem__(self, where: tuple[slice, slice]) -> np.ndarray:
    rows, columns = where
    keys = np.arange(self.shape[1])[columns]
    return _sees(self.q_sequence[rows][:, None], keys[None])

  def __eq__(self, other: object) -> bool:
    same = isinstance(other, SetCausalMask)
    return same and np.array_equal(self.q_sequence, other.q_sequence)

  def __hash__(self) -> int:
    return hash(self.q_sequence.tobytes())


def _splash_kernel(
  mask: SetCausalMask, heads: int, channels: int, tile: int, interpret: bool
):
  """The kernel over [heads, L, K]; its forward results are remat's to save."""
  names = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv')
  names += ('block_q_dq', 'block_kv_dq')
  # Which axis is the last in memory, where TPUs fill tiles of 128.
  layouts = splash.QKVLayout
  last = layouts.SEQ_MINOR if channels % 128 else layouts.HEAD_DIM_MINOR
  turned = dict.fromkeys(('q_layout', 'k_layout', 'v_layout'), last)
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(**dict.fromkeys(names, tile), **turned),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=ATTENTION,
    interpret=interpret,
  )


def splash_attention(
  q: Float[Array, 'B L H K'],
  k: Float[Array, 'B L H K'],
  v: Float[Array, 'B L H K'],
  scale: float,
  key_valid: Bool[Array, 'B L'] | None,
  *,
  set_ids: Int[np.ndarray, ' L'],
  padding: tuple[int, int] | None,
) -> Float[Array, 'B L H K']:
  """Pallas flash attention on TPUs, interpreted (slowly) on CPUs.

  The kernel runs on each device's own rows and heads. Keys that are padding
  get a segment of their own, which hides them from all valid queries. The
  few queries in the range `padding` may be padding themselves, and read
  the valid keys and themselves: no segment says that, so that they are
  computed apart, over the keys up to their set.

  Args:
    q: queries.
    k: keys.
    v: values.
    scale: of the logits.
    key_valid: False at keys hidden from all but themselves, or None.
    set_ids: never falling.
    padding: [first, last) positions outside of which every key is valid; not
      None if `key_valid` is given.
  """
  tile, size = tiles(q.shape[1])
  mask = SetCausalMask(set_ids, size)
  interpret = platform() == 'cpu'

  def arranged(x: Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3)

  def local(q: Array, k: Array, v: Array, segments: Array | None) -> jax.Array:
    kernel: Any = _splash_kernel(mask, q.shape[1], q.shape[3], tile, interpret)
    if segments is None:
      return jax.vmap(kernel)(q, k, v)
    pairs = splash.SegmentIds(segments, segments)
    return jax.vmap(kernel)(q, k, v, pairs)

  # The kernel has no scale; float32, or bfloat16 would round the factor too.
  scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
  args = [arranged(scaled), arranged(k), arranged(v)]
  axes = [('batch', 'act_heads', None, None)] * 3
  if key_valid is None:
    local = functools.partial(local, segments=None)
  else:
    pad = ((0, 0), (0, size - key_valid.shape[1]))
    args.append(jnp.pad(key_valid.astype(jnp.int32), pad, constant_values=1))
    axes.append(('batch', None))
  out = mapped(local, args, axes)
  out = out.transpose(0, 2, 1, 3)[:, : q.shape[1]]
  if key_valid is None:
    return out
  assert padding is not None
  first, last = padding
  end = int(np.searchsorted(set_ids, set_ids[last - 1], side='right'))
  apart = attend(
    q[:, first:last],
    k[:, :end],
    v[:, :end],
    set_mask(set_ids[first:last], set_ids[:end], key_valid[:, :end], first),
    scale=scale,
  )
  return out.at[:, first:last].set(apart)


def cudnn_attention(
  q: Float[Array, 'B L H K'],
  k: Float[Array, 'B L H K'],
  v: Float[Array, 'B L H K'],
  scale: float,
  key_valid: Bool[Array, 'B L'] | None,
  *,
  set_ids: Int[np.ndarray, ' L'],
  padding: tuple[int, int] | None,
  implementation: Literal['xla', 'cudnn'] = 'cudnn',
) -> Float[Array, 'B L H K']:
  """Flash attention of cuDNN; arguments as in `splash_attention`.

  A strictly causal sequence needs no mask array. Any other mask goes in as
  one, for which cuDNN wants an even length in training.
  """
  del padding
  length = q.shape[1]
  dense: Any = jax.nn.dot_product_attention
  if key_valid is None and np.all(np.diff(set_ids) > 0):
    return dense(
      q, k, v, scale=scale, is_causal=True, implementation=implementation
    )
  odd = length % 2
  if odd:  # one more position, which no other sees
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    set_ids = np.append(set_ids, set_ids[-1] + 1)
    if key_valid is not None:
      key_valid = jnp.pad(key_valid, ((0, 0), (0, 1)), constant_values=True)
  mask = set_mask(set_ids, set_ids, key_valid)[:, None]
  out = dense(q, k, v, mask=mask, scale=scale, implementation=implementation)
  return out[:, :length]


KERNELS = {'splash': splash_attention, 'cudnn': cudnn_attention}
