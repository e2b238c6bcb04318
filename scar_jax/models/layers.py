"""Layers that the decoder and the assembled model share.

Norms, feed-forwards, rotary tables, token embeddings, dropout and drop path.
Parameters are float32; norms and rotations compute in float32 and return the
compute type. Source: method 3.2-3.4, 4.3.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models.dense import Dense, Init
from scar_jax.sharding import annotated, constrain, platform


class RMSNorm(nn.Module):
  """x / rms(x) in float32, cast to `dtype`, times a learned scale."""

  eps: float = 1e-5
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    """Normalises the last axis."""
    scale = self.param(
      'scale', annotated(nn.initializers.ones, None), (x.shape[-1],)
    )
    shape, x = x.shape, squeezed(x).astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
    return (x.astype(self.dtype) * scale.astype(self.dtype)).reshape(shape)


def squeezed(x: Array) -> Array:
  """Without leading axes of one element, [1, L, D] -> [L, D].

  With them a norm of [1, 680, 768] and its gradient take CPUs 12 ms, not 0.9.
  """
  first = next((i for i, n in enumerate(x.shape[:-2]) if n > 1), x.ndim - 2)
  return x.reshape(x.shape[max(first, 0) :])


def layer_norm(x: Float[Array, '*B D'], eps: float) -> Float[Array, '*B D']:
  """LayerNorm without scale or bias, in float32."""
  shape, x = x.shape, squeezed(x).astype(jnp.float32)
  x = x - jnp.mean(x, -1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
  return x.reshape(shape)


class SwiGLU(nn.Module):
  """w2(silu(w1 x) * w3 x), no biases."""

  hidden: int
  kernel_init: Init = nn.initializers.normal(0.02)
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
    """[B, L, D] -> [B, L, D]."""

    def dense(size: int, name: str, *axes: str) -> Dense:
      return Dense(
        (size,), axes, kernel_init=self.kernel_init, dtype=self.dtype, name=name
      )

    h = nn.silu(dense(self.hidden, 'w1', 'embed', 'mlp')(x))
    h = h * dense(self.hidden, 'w3', 'embed', 'mlp')(x)
    h = constrain(h, 'batch', 'length', 'act_mlp')
    return dense(x.shape[-1], 'w2', 'mlp', 'embed')(h)


class GeluMLP(nn.Module):
  """fc2(gelu_tanh(fc1 x)), with or without biases."""

  hidden: int
  out: int
  use_bias: bool = True
  kernel_init: Init = nn.initializers.normal(0.02)
  out_init: Init | None = None
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L O']:
    """[B, L, D] -> [B, L, out]."""

    def dense(size: int, name: str, init: Init, *axes: str) -> Dense:
      return Dense(
        (size,),
        axes,
        use_bias=self.use_bias,
        kernel_init=init,
        dtype=self.dtype,
        name=name,
      )

    h = dense(self.hidden, 'fc1', self.kernel_init, 'embed', 'mlp')(x)
    h = nn.gelu(h, approximate=True)
    init = self.out_init or self.kernel_init
    return dense(self.out, 'fc2', init, 'mlp', 'embed')(h)


class Embed(nn.Module):
  """A table of vectors; ids outside it are clipped, callers mask them."""

  count: int
  width: int
  kernel_init: Init = nn.initializers.normal(0.02)
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, ids: Int[Array, '*B']) -> Float[Array, '*B D']:
    """Rows of the table."""
    table = self.param(
      'embedding',
      annotated(self.kernel_init, 'vocab', 'embed'),
      (self.count, self.width),
    )
    return jnp.take(table, ids, axis=0, mode='clip').astype(self.dtype)


def rope_table(
  positions: Float[Array, '*B L 2'],
  head_dim: int,
  base: float = 10000.0,
  zero_rows: Bool[Array, ' L'] | None = None,
) -> tuple[Float[Array, '*B L F'], Float[Array, '*B L F']]:
  """(cos, sin) of the 2D rotary embedding, [..., L, head_dim / 2] float32.

  Row angles come first, then column angles, each with head_dim / 4
  frequencies base ** (-4 j / head_dim). Numpy in, numpy out.

  Args:
    positions: (row, column) of each position.
    head_dim: a multiple of 4.
    base: of the frequencies.
    zero_rows: rows where cos and sin are both 0: q and k become zero vectors.

  Raises:
    ValueError: head_dim is not a multiple of 4.
  """
  if head_dim % 4:
    raise ValueError(
      f'head dim {head_dim} (width / heads) with a rotary embedding; accepted: '
      'multiples of 4 (set --config.model.width or heads)'
    )
  xp: Any = np if isinstance(positions, np.ndarray) else jnp
  j = np.arange(head_dim // 4, dtype=np.float32)
  freq = 1.0 / np.float32(base) ** (2 * j / np.float32(head_dim / 2))
  angles = positions.astype(np.float32)[..., None] * freq.astype(np.float32)
  angles = angles.reshape(*positions.shape[:-1], head_dim // 2)
  cos, sin = xp.cos(angles), xp.sin(angles)
  if zero_rows is not None:
    kept = xp.where(zero_rows, np.float32(0), np.float32(1))[:, None]
    cos, sin = cos * kept, sin * kept
  return cos, sin


def spread_rope(
  rope: tuple[Float[Array, '*B L F'], Float[Array, '*B L F']],
) -> tuple[Float[Array, '_ L 1 K'], Float[Array, '_ L 1 K']]:
  """The table with both members of a pair written out, once for all layers."""

  def spread(x: Array) -> Array:
    if isinstance(x, np.ndarray):  # of constants
      pairs = np.repeat(x, 2, axis=-1)
    elif platform() == 'cpu':
      # XLA fuses what is repeated, cosines and all, into every layer that reads
      # it; a product with ones and zeros is as exact, and kept.
      pairs = x @ np.repeat(np.eye(x.shape[-1], dtype=np.float32), 2, axis=-1)
    else:
      pairs = jnp.repeat(x, 2, axis=-1)
    pairs = pairs[..., None, :]
    return pairs[None] if pairs.ndim == 3 else pairs

  return spread(rope[0]), spread(rope[1])


def rotate(
  x: Float[Array, 'B L H K'],
  cos: Float[Array, '_ L 1 K'],
  sin: Float[Array, '_ L 1 K'],
) -> Float[Array, 'B L H K']:
  """Rotates pairs (2i, 2i + 1) by a spread table, in float32."""
  y = x.astype(jnp.float32)
  size = y.shape[-1]
  even = np.arange(size) % 2 == 0
  device = platform()
  if device == 'cpu' or (device == 'tpu' and x.dtype == jnp.bfloat16):
    # A product with zeros and ones is as exact, and all becomes one pass over
    # memory where rolls are three.
    turn = np.eye(size, k=1) * even[:, None] - np.eye(size, k=-1) * even
    swapped = jax.lax.dot_general(
      x,
      jnp.asarray(turn, x.dtype),
      (((x.ndim - 1,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
  else:
    # Rolls instead of strided slices: the pair axis never becomes a minor axis
    # of size 2, which accelerators lay out badly.
    swapped = jnp.where(even, -jnp.roll(y, -1, -1), jnp.roll(y, 1, -1))
  return (y * cos + swapped * sin).astype(x.dtype)


def apply_rope(
  x: Float[Array, 'B L H K'],
  rope: tuple[Float[Array, '*B L F'], Float[Array, '*B L F']],
) -> Float[Array, 'B L H K']:
  """Rotates q or k by a table of `rope_table`."""
  return rotate(x, *spread_rope(rope))


def dropout(
  x: Float[Array, '*B'], rate: float, rng: Array | None
) -> Float[Array, '*B']:
  """Zeroes elements with probability `rate`; None or 0 leaves x alone."""
  if rng is None or not rate:
    return x
  keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def drop_path(
  x: Float[Array, 'B L D'], rate: float | Array, rng: Array | None
) -> Float[Array, 'B L D']:
  """Drops a whole branch per sample, the rest scaled by 1 / keep."""
  if rng is None:
    return x
  keep = 1.0 - jnp.asarray(rate, jnp.float32)
  kept = jax.random.bernoulli(rng, keep, (x.shape[0], 1, 1))
  return x * (kept / keep).astype(x.dtype)


def place_waves(places: np.ndarray, width: int) -> np.ndarray:
  """Sines and cosines of places in a picture, float32 [n, width], of unit RMS.

  Rows of near places are alike, whatever grid they are on. Wavelengths run from
  four pictures down to an eighth of one, half of the channels for each axis.

  Args:
    places: (row, column) in units of the picture, [n, 2].
    width: a multiple of 4.
  """
  waves = 2 * np.pi * np.geomspace(0.25, 8, width // 4)
  angle = (places[..., None] * waves).reshape(len(places), -1)
  pair = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
  return (np.sqrt(2) * pair).astype(np.float32)
