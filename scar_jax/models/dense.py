"""Linear maps, and how CPUs multiply fastest.

In: `[*B, *in]` and a kernel `[*in, *out]`. Out: `[*B, *out]`. Kernels may also
lie with their outputs first, in float or in int8 (`outputs_first` here,
`precision.py`). Called by every network with a matrix product in it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from scar_jax.sharding import annotated, platform
from scar_jax.types import PyTree

Init = Callable[..., Any]
# In place of a kernel, both with their outputs first. What is in int8 is less
# than the kernel by its scale.
TURNED = 'kernel_turned'
INT8, INT8_SCALE = 'kernel_int8', 'kernel_scale'
_TILE = 32  # bfloat16 values in a row of a CPU's matrix unit
# Up to so many rows CPUs multiply fastest with a turned kernel on the left.
_FEW_ROWS = 32


class Dense(nn.Module):
  """Linear map of the last `in_dims` axes to `features`, one matmul.

  Attributes:
    features: sizes of the new axes.
    axes: logical names of all kernel axes, input axes first.
    in_dims: how many input axes are summed over.
    use_bias: adds a bias of shape `features`, zero at the start.
    kernel_init: of the kernel.
    dtype: of the matmul.
    out_dtype: of the result, `dtype` by default.
    apart: the first new axis comes as a tuple of results, such as q, k and v.
      On TPUs each has a matmul of its own, where they are longer than the
      kernel: taken out of one result they are copied, and their gradients put
      together again. Of a short one, such as a decoding step's, they cost less
      than the kernel, which would be copied to be taken apart.
  """

  features: tuple[int, ...]
  axes: tuple[str | None, ...]
  in_dims: int = 1
  use_bias: bool = False
  kernel_init: Init = nn.initializers.normal(0.02)
  dtype: str = 'float32'
  out_dtype: str | None = None
  apart: bool = False

  @nn.compact
  def __call__(self, x: Shaped[Array, '...']) -> Any:
    """[*B, *in] -> [*B, *features]."""
    shape = (*x.shape[x.ndim - self.in_dims :], *self.features)
    scale = bias = None
    stored = next(
      (name for name in (INT8, TURNED) if self.has_variable('params', name)), ''
    )
    if stored:
      kernel = self.get_variable('params', stored)
    else:
      kernel = self.param(
        'kernel', annotated(self.kernel_init, *self.axes), shape
      )
    if stored == INT8:
      scale = self.get_variable('params', INT8_SCALE)
    if self.use_bias:
      zeros = annotated(nn.initializers.zeros, *self.axes[self.in_dims :])
      bias = self.param('bias', zeros, self.features)
    product = functools.partial(self._product, turned=bool(stored))
    if not self.apart:
      return product(x, kernel, scale, bias)
    parts = range(self.features[0])
    rows = math.prod(x.shape[: x.ndim - self.in_dims])
    if platform() != 'tpu' or rows < math.prod(shape[: self.in_dims]):
      whole = product(x, kernel, scale, bias)
      axis = whole.ndim - len(self.features)
      # Unlike slices, a split has a gradient that is put together at once.
      return tuple(
        jnp.squeeze(part, axis)
        for part in jnp.split(whole, self.features[0], axis)
      )
    before = () if stored else (slice(None),) * self.in_dims
    return tuple(
      product(
        x,
        kernel[(*before, i)],
        None if scale is None else scale[i],
        None if bias is None else bias[i],
      )
      for i in parts
    )

  def _product(self, x, kernel, scale, bias, turned) -> Any:
    x, out_dtype = x.astype(self.dtype), self.out_dtype or self.dtype
    if scale is not None:
      x = _int8_product(x, kernel, self.in_dims, out_dtype)
      # One for each output channel, so that it may follow the matmul.
      x = x * scale.astype(x.dtype)
    elif platform() != 'cpu':
      kernel = kernel.astype(self.dtype)
      x = _dot(x, kernel, self.in_dims, self.out_dtype, turned)
    else:
      # Rounded to bfloat16 after the bias: its gradient is a sum over rows,
      # which CPUs take in float32.
      dot = _cpu_turned if turned else _cpu_dot
      x = dot(x, kernel.astype(self.dtype), self.in_dims)
      x = x if bias is None else x + bias
      return x.astype(out_dtype)
    return x if bias is None else x + bias.astype(x.dtype)


def outputs_first(params: PyTree) -> PyTree:
  """`Dense` parameters as they multiply many rows fastest: kernels turned.

  CPUs take a tenth longer for [257, 768] times a kernel with its inputs first.
  Only kernels that have a bias: its axes say which of the kernel's are outputs.

  Args:
    params: of modules whose linear maps are all `Dense`.
  """
  if not isinstance(params, dict):
    return params
  if 'kernel' not in params or 'bias' not in params:
    return {name: outputs_first(x) for name, x in params.items()}
  rest = dict(params)
  kernel, outputs = rest.pop('kernel'), rest['bias'].ndim
  return {**rest, TURNED: turned(kernel, kernel.ndim - outputs, outputs)}


def turned(kernel: Array, inputs: int, outputs: int) -> jax.Array:
  """[*layers, *inputs, *outputs] -> [*layers, *outputs, *inputs].

  Args:
    kernel: of one layer, or of a stack.
    inputs: how many axes they have.
    outputs: the same.
  """
  end = kernel.ndim - outputs
  return jnp.moveaxis(kernel, range(end - inputs, end), range(-inputs, 0))


def _dot(
  x: jax.Array, kernel: jax.Array, in_dims: int, dtype: Any, turned: bool
) -> jax.Array:
  """Sums over the last axes of `x`, the kernel's first or, turned, last."""
  first = kernel.ndim - in_dims if turned else 0
  summed = tuple(range(x.ndim - in_dims, x.ndim))
  of_kernel = tuple(range(first, first + in_dims))
  return jax.lax.dot_general(
    x, kernel, ((summed, of_kernel), ((), ())), preferred_element_type=dtype
  )


def _int8_product(
  x: jax.Array, kernel: jax.Array, in_dims: int, dtype: Any
) -> jax.Array:
  """`_dot` with a kernel [*outputs, *inputs] in int8, less its scale.

  On CPUs each row of `x` is rounded to int8 too: they would write the kernel
  out in float32 before they multiply, or hold it so throughout a loop.
  """
  if platform() != 'cpu':
    return _dot(x, kernel.astype(x.dtype), in_dims, dtype, turned=True)
  rows, weights = _matrices(x, kernel, in_dims)
  rows = rows.astype(jnp.float32)
  scale = jnp.max(jnp.abs(rows), -1, keepdims=True) / 127
  small = jnp.round(rows / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
  out = _cpu_turned(small, weights, 1, jnp.int32)
  out = (out.astype(jnp.float32) * scale).astype(dtype)
  return out.reshape(_out_shape(x, kernel, in_dims))


def _cpu_turned(
  x: jax.Array, kernel: jax.Array, in_dims: int, dtype: Any = jnp.float32
) -> jax.Array:
  """`_dot` with a kernel [*outputs, *inputs].

  XLA's CPU compiler rearranges the right factor before it multiplies, which of
  a kernel takes longer than a product of few rows. On the left it is read as it
  lies.
  """
  rows, weights = _matrices(x, kernel, in_dims)
  if len(rows) > _FEW_ROWS:
    out = _dot(rows, weights, 1, dtype, turned=True)
  else:
    out = _dot(weights, rows, 1, dtype, turned=True)
    # Or the compiler would swap the factors to save the transposition.
    out = jax.lax.optimization_barrier(out).T
  return out.reshape(_out_shape(x, kernel, in_dims))


def _matrices(x, kernel, in_dims):
  """Of matrices: with more axes a turned kernel would be transposed before."""
  size = math.prod(kernel.shape[kernel.ndim - in_dims :])
  return x.reshape(-1, size), kernel.reshape(-1, size)


def _out_shape(x, kernel, in_dims):
  outputs = kernel.shape[: kernel.ndim - in_dims]
  return (*x.shape[: x.ndim - in_dims], *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cpu_dot(x: jax.Array, kernel: jax.Array, in_dims: int) -> jax.Array:
  """`_dot`, float32, transposing the narrower factor for the kernel's gradient.

  The usual rule always transposes the gradient of the result, and XLA's CPU
  compiler then computes what that comes through, `silu` say, in transposed
  order: half as long again for a feed-forward. All are products of matrices:
  of more axes, the kernel is copied first.

  Results are float32, whatever the factors: where bfloat16 is to come out, the
  compiler widens what goes in, and a CPU's unit for bfloat16 stays unused.
  """
  return _dot(x, kernel, in_dims, jnp.float32, turned=False)


def _cpu_back(in_dims, kept, g):
  x, kernel = kept
  inputs = math.prod(kernel.shape[:in_dims])
  rows, weights = x.reshape(-1, inputs), kernel.reshape(inputs, -1)
  g = g.astype(x.dtype).reshape(len(rows), -1)
  back = _dot(g, weights, 1, jnp.float32, turned=True)
  if x.size > g.size:
    # Not of bfloat16: the compiler puts the transposition of the result into
    # the product, and then cannot compute it.
    grad = _sum(g.astype(jnp.float32), rows.astype(jnp.float32)).T
  else:
    grad = _sum(rows, g)
  return (
    back.astype(x.dtype).reshape(x.shape),
    grad.astype(kernel.dtype).reshape(kernel.shape),
  )


_cpu_dot.defvjp(
  lambda x, kernel, in_dims: (_cpu_dot(x, kernel, in_dims), (x, kernel)),
  _cpu_back,
)


def _sum(x: Shaped[Array, 'L M'], y: Shaped[Array, 'L N']) -> jax.Array:
  """`x^T y`, float32 [M, N].

  XLA's CPU compiler hands no sum of bfloat16 over rows on to the unit for it.
  With `x` transposed before, it is four times as fast; the rows of zeros keep
  the compiler from putting the transposition back.
  """
  axis = 0
  if x.dtype == jnp.bfloat16:
    fill = -len(x) % _TILE or _TILE
    x, axis = jnp.pad(x.T, ((0, 0), (0, fill))), 1
    y = jnp.pad(y, ((0, fill), (0, 0)))
  return jax.lax.dot_general(
    x, y, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )
