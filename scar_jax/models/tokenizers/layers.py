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
from jaxtyping import Array, Float, Int

from scar_jax.models.convolutions import batch_conv, under_taps
from scar_jax.sharding import annotated, platform

CONV_IMPLS = ('auto', 'xla', 'matmul')
_LARGE_MAP = 512  # positions; both ways are equally fast on 16x16 maps
Padding = tuple[tuple[int, int], tuple[int, int]]


def check_impl(impl: str) -> None:
  """Raises ValueError for an unknown convolution implementation."""
  if impl not in CONV_IMPLS:
    raise ValueError(
      f'conv_impl={impl!r}; accepted: {CONV_IMPLS} (set `conv_impl` in the '
      'tokenizer config)'
    )


def conv2d(
  x: Float[Array, 'B H W C'],
  kernel: Float[Array, 'k l C F'],
  stride: int = 1,
  padding: Padding = ((1, 1), (1, 1)),
  impl: str = 'auto',
) -> Float[Array, 'B h w F']:
  """Convolution with a choice of how its weight gradient is computed.

  Measured on two CPU cores, XLA's weight gradients run at 3 to 7 GFLOP/s on
  maps of 32x32 while its forward pass and input gradient run at 50; one matrix
  product per tap (or over the shifted output gradient, where that has fewer
  channels) runs at 15 to 40. Elsewhere the native gradient wins.

  Args:
    x: input map.
    kernel: HWIO.
    stride: same on both axes.
    padding: zeros before and after, rows then columns.
    impl: 'xla', 'matmul', or 'auto': 'matmul' for large maps on the CPU.

  Raises:
    ValueError: unknown `impl`.
  """
  check_impl(impl)
  if kernel.shape[:2] == (1, 1) and stride == 1:
    return x @ kernel[0, 0]
  if impl == 'auto':
    large = x.shape[1] * x.shape[2] >= _LARGE_MAP
    impl = 'matmul' if platform() == 'cpu' and large else 'xla'
  conv = _conv_by_matmul if impl == 'matmul' else _conv
  return conv(x, kernel, stride, padding)


def doubled_conv2d(
  x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C F'], impl: str
) -> Float[Array, 'B h w F']:
  """`conv2d` of a map on which every position is repeated 2 x 2.

  Each output sees only 2 x 2 positions of `x`, some under several taps. CPUs
  add those taps up before: 4 products in place of 9, twice as fast. Other
  chips have multiplications to spare.

  Args:
    x: the map before it is doubled.
    kernel: HWIO.
    impl: see `conv2d`.
  """
  b, h, w, c = x.shape
  if platform() != 'cpu':
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return conv2d(x.reshape(b, 2 * h, 2 * w, c), kernel, impl=impl)
  rows = []
  for i, of_row in enumerate(_taps_of_halves(kernel, 0)):
    row = [
      conv2d(x, taps, 1, ((1 - i, i), (1 - j, j)), impl)
      for j, taps in enumerate(_taps_of_halves(of_row, 1))
    ]
    rows.append(jnp.stack(row, axis=3))
  return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)


def _taps_of_halves(kernel: Array, axis: int) -> tuple[Array, Array]:
  """The taps that the first and second copy of a position sees."""
  before, here, after = jnp.split(kernel, 3, axis)
  first = jnp.concatenate([before, here + after], axis)
  return first, jnp.concatenate([before + here, after], axis)


def _conv(
  x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> jax.Array:
  return batch_conv(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


_conv_by_matmul = jax.custom_vjp(_conv, nondiff_argnums=(2, 3))


def _conv_forward(x, kernel, stride, padding):
  return _conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, saved, g):
  x, kernel = saved
  _, pull = jax.vjp(lambda x: _conv(x, kernel, stride, padding), x)
  return *pull(g), _weight_gradient(x, g, kernel.shape, stride, padding)


def _weight_gradient(
  x: jax.Array,
  g: jax.Array,
  shape: tuple[int, ...],
  stride: int,
  padding: Padding,
) -> jax.Array:
  """Kernel gradient; shifts whichever of input and gradient is narrower."""
  kh, kw, c, f = shape
  if f < c and stride == 1:
    height, width = x.shape[1:3]
    (top, bottom), (left, right) = padding
    rows = (kh - 1 - top, kh - 1 - bottom)
    cols = (kw - 1 - left, kw - 1 - right)
    g = jnp.pad(g, ((0, 0), rows, cols, (0, 0)))
    moved = [
      g[:, kh - 1 - i :, kw - 1 - j :][:, :height, :width]
      for i in range(kh)
      for j in range(kw)
    ]
    moved_g = jnp.concatenate(moved, axis=-1).reshape(-1, kh * kw * f)
    dw = jnp.einsum('nc,nf->cf', x.reshape(-1, c), moved_g)
    return dw.reshape(c, kh, kw, f).transpose(1, 2, 0, 3)
  flat_g = g.reshape(-1, f)
  dw = [
    jnp.einsum('nc,nf->cf', seen.reshape(-1, c), flat_g)
    for seen in under_taps(x, (kh, kw), (stride, stride), padding)
  ]
  return jnp.stack(dw).reshape(shape)


_conv_by_matmul.defvjp(_conv_forward, _conv_backward)


class Conv(nn.Module):
  """2-D convolution; parameters are the same for every `impl`.

  With `doubles` every position of the map is first repeated 2 x 2.
  """

  features: int
  window: int = 3
  stride: int = 1
  padding: Padding = ((1, 1), (1, 1))
  use_bias: bool = True
  impl: str = 'auto'
  dtype: str = 'float32'
  doubles: bool = False
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
    if self.doubles:
      y = doubled_conv2d(x, kernel, self.impl)
    else:
      y = conv2d(x, kernel, self.stride, self.padding, self.impl)
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
    x = x.astype(jnp.float32)
    x = x - self._mean(x)
    x = x * jax.lax.rsqrt(self._mean(jnp.square(x)) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)

  def _mean(self, x: Array) -> Array:
    """Of each group, or position, for each of its channels."""
    if not self.groups:
      return jnp.mean(x, -1, keepdims=True)
    # Over space first: with the few channels of a group beside it a large map
    # takes nearly twice as long, and float32 loses a digit.
    each = jnp.mean(x, (1, 2)).reshape(len(x), self.groups, -1)
    size = each.shape[-1]
    return jnp.repeat(jnp.mean(each, -1), size, axis=1)[:, None, None]


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
    conv = Conv(
      x.shape[-1], impl=self.impl, dtype=self.dtype, doubles=True, name='conv'
    )
    return conv(x)


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


def look_up(
  table: Float[Array, 'V C'], ids: Int[Array, '...'] | Float[Array, '... V']
) -> Float[Array, '... C']:
  """Rows of a table; of weights over all rows, their weighted sum."""
  if jnp.issubdtype(ids.dtype, jnp.floating):
    return ids @ table
  return table[ids]
