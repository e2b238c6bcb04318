"""Convolutions on a mesh, as matrix products, and of one picture at a time.

In: pictures `[B, H, W, C]` and a kernel `[k, l, C, F]`. Out: `[B, h, w, F]`.
Called by `prefill.py`, by the tokenizers' layers and, for whole networks, by
`parts.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from scar_jax.sharding import BATCH_AXES, constrain, logical_spec, platform

_LARGE_PICTURE = 2**15  # pixels


def batch_conv(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> jax.Array:
  """`lax.conv_general_dilated` of each device's own rows.

  Left alone, the compiler keeps a kernel that FSDP has split along its output
  channels where it is, and brings the pictures of all devices to every part of
  it: memory that grows with the mesh. Here the kernel comes to the pictures,
  and its gradient goes back in parts, where the compiler would first add up
  the whole of it on every device.

  Args:
    x: [B, H, W, C].
    kernel: [k, l, C, F].
    *args: of the convolution.
    **kwargs: of the convolution.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)
  sizes = dict(mesh.shape)
  rows = logical_spec(('batch', None, None, None), x.shape, sizes)
  parts = logical_spec((None, None, None, 'embed'), kernel.shape, sizes)
  split = rows[0] if isinstance(rows[0], tuple) else (rows[0],)
  copies = tuple(axis for axis in split if axis not in (parts[-1], None))

  def local(x: Array, kernel: Array) -> jax.Array:
    if parts[-1]:
      # Copies first: so the gradient is split before it crosses their axes.
      kernel = jax.lax.pcast(kernel, copies, to='varying')
      kernel = jax.lax.all_gather(kernel, parts[-1], axis=3, tiled=True)
    return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

  # Output channels are left to the compiler, by the axis `tensor`.
  y = jax.shard_map(
    local,
    in_specs=(rows, parts),
    out_specs=rows,
    axis_names=set(BATCH_AXES),
  )(x, kernel)
  return constrain(y, 'batch', None, None, None)


def each_picture(
  network: Callable[[Any], Any], x: Shaped[Array, 'B ...'], pixels: int
) -> Any:
  """A convolutional network over a batch, on CPUs over one picture at a time.

  Their caches do not hold the maps of several large ones: four of 256 pixels
  take 15 to 30 % longer together.

  Args:
    network: takes an array with an axis of pictures first and gives such an
      array, or a tree of them; has no randomness.
    x: pictures, or what they are made from.
    pixels: of a picture.
  """
  mesh = jax.sharding.get_abstract_mesh()
  spread = not mesh.empty and mesh.size > 1
  small = pixels < _LARGE_PICTURE or len(x) == 1
  if platform() != 'cpu' or spread or small:
    return network(x)

  def of_one(one: Array) -> Any:
    return jax.tree.map(lambda y: y[0], network(one[None]))

  return jax.lax.map(of_one, x)


def under_taps(
  x: Float[Array, 'B H W C'],
  window: Sequence[int],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> list[Float[Array, 'B h w C']]:
  """What each tap of a convolution sees at its output positions, row-major.

  Args:
    x: pictures.
    window: taps along rows and columns.
    strides: along rows and columns.
    padding: before and after, along rows and columns.
  """
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  rows, columns = strides
  h = (x.shape[1] - window[0]) // rows + 1
  w = (x.shape[2] - window[1]) // columns + 1
  return [
    x[:, i::rows, j::columns][:, :h, :w]
    for i in range(window[0])
    for j in range(window[1])
  ]


def product_conv(
  x: Float[Array, 'B H W C'],
  kernel: Float[Array, 'k l C F'],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  **_: Any,
) -> Float[Array, 'B h w F']:
  """A convolution as one matmul over the values under all taps.

  On TPUs the gradient of a matmul's kernel is split over the mesh while it is
  computed, and that of a convolution only afterwards. In exchange the values
  under the taps are written out, k l / stride^2 times the input.

  Args:
    x: pictures.
    kernel: of the convolution.
    strides: along rows and columns.
    padding: before and after, along rows and columns.
    **_: what flax gives besides: channels last, no dilation, one group.
  """
  under = under_taps(x, kernel.shape[:2], strides, padding)
  x = constrain(jnp.concatenate(under, axis=-1), 'batch', None, None, None)
  y = x.reshape(len(x), -1, x.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
  y = y.reshape(*x.shape[:-1], -1)
  return constrain(y, 'batch', None, None, None)
