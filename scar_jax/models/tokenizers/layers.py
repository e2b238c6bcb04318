"""Convolutional blocks of the image tokenizers and of the discriminator.

In: feature maps `[B, H, W, C]`. Out: the same rank. Convolutions pad
explicitly and hold HWIO kernels; norms run in float32. Called by vq.py and
gan.py; parameter paths are public API (converters name them).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scar_jax.sharding import annotated

CONV_IMPLS = ('auto', 'xla', 'matmul')
Padding = tuple[tuple[int, int], tuple[int, int]]


def use_matmul(impl: str, positions: int) -> bool:
  """Whether a convolution becomes patches and one matrix product.

  XLA's CPU backend is slow at the weight gradients of some convolutions, while
  its matrix products are fast; elsewhere the native convolution wins.

  Args:
    impl: 'xla', 'matmul', or 'auto' (by backend and size).
    positions: output height times width.

  Raises:
    ValueError: unknown `impl`.
  """
  if impl not in CONV_IMPLS:
    raise ValueError(
      f'conv_impl={impl!r}; accepted: {CONV_IMPLS} (set `conv_impl` in the '
      'tokenizer config)'
    )
  if impl == 'auto':
    # Patches of a large map cost more memory traffic than they save.
    return jax.default_backend() == 'cpu' and positions <= 64
  return impl == 'matmul'


def im2col(
  x: Float[Array, 'B H W C'], window: tuple[int, int], stride: int
) -> Float[Array, 'B h w F']:
  """Patches of an already padded map; taps row by row, channels innermost."""
  kh, kw = window
  h = (x.shape[1] - kh) // stride + 1
  w = (x.shape[2] - kw) // stride + 1
  taps = [
    x[:, i : i + stride * (h - 1) + 1 : stride,
      j : j + stride * (w - 1) + 1 : stride]
    for i in range(kh)
    for j in range(kw)
  ]  # fmt: skip
  return taps[0] if len(taps) == 1 else jnp.concatenate(taps, axis=-1)


class Conv(nn.Module):
  """2-D convolution; parameters are the same for every `impl`."""

  features: int
  window: int = 3
  stride: int = 1
  padding: Padding = ((1, 1), (1, 1))
  use_bias: bool = True
  impl: str = 'auto'
  dtype: str = 'float32'
  kernel_init: Callable[..., Any] = nn.initializers.variance_scaling(
    1 / 3, 'fan_in', 'uniform'
  )

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w F']:
    k = self.window
    kernel = self.param(
      'kernel',
      annotated(self.kernel_init, None, None, None, 'conv_out'),
      (k, k, x.shape[-1], self.features),
      jnp.float32,
    )
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    (top, bottom), (left, right) = self.padding
    h = (x.shape[1] + top + bottom - k) // self.stride + 1
    w = (x.shape[2] + left + right - k) // self.stride + 1
    if k == 1 and self.stride == 1:
      y = x @ kernel[0, 0]
    elif use_matmul(self.impl, h * w):
      x = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
      y = im2col(x, (k, k), self.stride) @ kernel.reshape(-1, self.features)
    else:
      y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (self.stride, self.stride),
        self.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )
    if self.use_bias:
      bias = self.param(
        'bias', annotated(nn.initializers.zeros_init(), 'conv_out'),
        (self.features,), jnp.float32,
      )  # fmt: skip
      y = y + bias.astype(self.dtype)
    return y


class Norm(nn.Module):
  """Group norm over space, or (groups 0) over the channels of each position.

  The second keeps decoding local: a token changes only its neighbourhood.
  """

  groups: int
  dtype: str = 'float32'
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    channels = x.shape[-1]
    if self.groups and channels % self.groups:
      raise ValueError(
        f'groups={self.groups} does not divide {channels} channels; accepted: '
        'a divisor of every ch * ch_mult, or 0 for per-position norms (set '
        '`groups` in the tokenizer config)'
      )
    scale = self.param(
      'scale', annotated(nn.initializers.ones_init(), None),
      (channels,), jnp.float32,
    )  # fmt: skip
    bias = self.param(
      'bias', annotated(nn.initializers.zeros_init(), None),
      (channels,), jnp.float32,
    )  # fmt: skip
    shape = x.shape
    x = x.astype(jnp.float32)
    axes: tuple[int, ...] = (-1,)
    if self.groups:
      x = x.reshape(shape[0], -1, self.groups, channels // self.groups)
      axes = (1, 3)
    mean = jnp.mean(x, axes, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axes, keepdims=True)
    x = ((x - mean) * jax.lax.rsqrt(var + self.epsilon)).reshape(shape)
    return (x * scale + bias).astype(self.dtype)


class ResnetBlock(nn.Module):
  """norm, swish, conv, norm, swish, dropout, conv, plus the input."""

  features: int
  groups: int
  dropout: float = 0.0
  impl: str = 'auto'
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B H W C'], deterministic: bool = True
  ) -> Float[Array, 'B H W F']:
    kw = dict(impl=self.impl, dtype=self.dtype)
    h = nn.swish(Norm(self.groups, self.dtype, name='norm1')(x))
    h = Conv(self.features, name='conv1', **kw)(h)
    h = nn.swish(Norm(self.groups, self.dtype, name='norm2')(h))
    h = nn.Dropout(self.dropout, name='drop')(h, deterministic)
    h = Conv(self.features, name='conv2', **kw)(h)
    if x.shape[-1] != self.features:
      x = Conv(
        self.features, 1, padding=((0, 0), (0, 0)), name='nin_shortcut', **kw
      )(x)
    return x + h


class AttnBlock(nn.Module):
  """Single-head attention over all positions, plus the input."""

  groups: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    b, height, width, c = x.shape
    kw = dict(window=1, padding=((0, 0), (0, 0)), dtype=self.dtype)
    h = Norm(self.groups, self.dtype, name='norm')(x)
    q, k, v = (
      Conv(c, name=name, **kw)(h).reshape(b, height * width, c)
      for name in ('q', 'k', 'v')
    )
    att_BxLxL = jnp.einsum(
      'blc,bmc->blm', q, k, preferred_element_type=jnp.float32
    )
    att_BxLxL = jax.nn.softmax(att_BxLxL * c**-0.5, axis=-1)
    h = jnp.einsum('blm,bmc->blc', att_BxLxL.astype(self.dtype), v)
    h = Conv(c, name='proj_out', **kw)(h.reshape(x.shape))
    return x + h


class Downsample(nn.Module):
  """Halves the map; pads below and to the right only, as the reference."""

  impl: str = 'auto'
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
    return Conv(
      x.shape[-1],
      stride=2,
      padding=((0, 1), (0, 1)),
      impl=self.impl,
      dtype=self.dtype,
      name='conv',
    )(x)


class Upsample(nn.Module):
  """Doubles the map by repetition, then a convolution."""

  impl: str = 'auto'
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    x = x.reshape(b, 2 * h, 2 * w, c)
    return Conv(c, impl=self.impl, dtype=self.dtype, name='conv')(x)


def space_to_depth(
  x: Float[Array, 'B H W C'], factor: int
) -> Float[Array, 'B h w F']:
  """Squares of `factor` pixels become channels (row, column, channel)."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // factor, factor, w // factor, factor, c)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h // factor, w // factor, factor * factor * c)


def depth_to_space(
  x: Float[Array, 'B h w F'], factor: int
) -> Float[Array, 'B H W C']:
  """The inverse of `space_to_depth`."""
  b, h, w, f = x.shape
  c = f // factor**2
  x = x.reshape(b, h, w, factor, factor, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * factor, w * factor, c)
