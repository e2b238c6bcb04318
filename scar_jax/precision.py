"""A model for sampling: bfloat16 products, int8, kernels as CPUs read them.

In: the config and parameters of a trained model. Out: the same, cheaper to
read: sampling step after step is bound by reading the weights. Only kernels of
`dense.Dense` change, which are nearly all of a decoder. Called by `editor.py`,
the plan of a sampler and the bench.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scar_jax.models.conditions import empty_conditions
from scar_jax.models.dense import INT8, INT8_SCALE, TURNED, Dense, turned
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.unstacked import is_large
from scar_jax.orders.scale import blank
from scar_jax.parts import EditorConfig
from scar_jax.sharding import platform
from scar_jax.types import PyTree

DTYPES = ('', 'float32', 'bfloat16')
WEIGHTS = ('', 'int8')


class _Kernel(NamedTuple):
  """A kernel of the model: [*layers, *inputs, *outputs]."""

  path: tuple[str, ...]
  inputs: int  # axes that are summed over
  outputs: int
  dtype: str


def check(dtype: str, weights: str) -> None:
  """Refuses unknown names.

  Raises:
    ValueError: names what is accepted.
  """
  for name, value, accepted in (
    ('dtype', dtype, DTYPES),
    ('weights', weights, WEIGHTS),
  ):
    if value not in accepted:
      raise ValueError(
        f'{name}={value!r}; accepted: {", ".join(map(repr, accepted))} '
        f'(argument {name} of Editor.load, or --{name})'
      )


def default_dtype() -> str:
  """'bfloat16' on accelerators; '' (as trained) on CPUs, where int8 helps."""
  return '' if jax.default_backend() == 'cpu' else 'bfloat16'


def with_dtype(cfg: EditorConfig, dtype: str) -> EditorConfig:
  """Matrix products and cache of the model and its encoders in a type.

  The residual stream, norms, softmax and the tokenizer stay as they are.
  """
  if not dtype:
    return cfg
  model, text = cfg.model, cfg.model.text
  if text.encoder is not None:
    encoder = dataclasses.replace(text.encoder, dtype=dtype)
    text = dataclasses.replace(text, encoder=encoder)
  model = dataclasses.replace(
    model,
    decoder=dataclasses.replace(model.decoder, dtype=dtype),
    prefix=dataclasses.replace(model.prefix, dtype=dtype),
    text=dataclasses.replace(text, dtype=dtype),
  )
  return dataclasses.replace(
    cfg, model=model, encoder_dtype=dtype, text_dtype=dtype
  )


def for_sampling(
  cfg: ScarConfig,
  params: PyTree,
  weights: str = '',
  turn: bool | None = None,
) -> PyTree:
  """Kernels stored as they are used: in their product's type, or in int8.

  Args:
    cfg: of the model.
    params: of the model.
    weights: 'int8' gives, in place of every kernel, `kernel_int8` with outputs
      first and in float32 a `kernel_scale` for each output channel of each
      layer.
    turn: other kernels with their outputs first, see `dense.py`; by default
      those of a large model on a CPU.
  """
  if turn is None:
    turn = platform() == 'cpu' and is_large(params)
  if not (turn or weights) and cfg.decoder.dtype == 'float32':
    return params
  params = jax.tree.map(lambda x: x, params)  # containers of our own
  for kernel in _kernels(cfg):
    place = params
    for name in kernel.path:
      place = place[name]
    if weights == 'int8':
      place[INT8], place[INT8_SCALE] = _rounded(place.pop('kernel'), kernel)
    else:
      value = place.pop('kernel').astype(kernel.dtype)
      if turn:
        place[TURNED] = turned(value, kernel.inputs, kernel.outputs)
      else:
        place['kernel'] = value
  return params


@jax.jit(static_argnames='kernel')
def _rounded(
  value: Float[Array, '...'], kernel: _Kernel
) -> tuple[Array, Float[Array, '...']]:
  """Int8 and its scales; symmetric, the largest of a channel is 127."""
  end = value.ndim - kernel.outputs
  axes = tuple(range(end - kernel.inputs, end))
  largest = jnp.max(jnp.abs(value.astype(jnp.float32)), axes, keepdims=True)
  scale = jnp.where(largest > 0, largest / 127, 1.0)
  small = jnp.round(value / scale).astype(jnp.int8)
  small = turned(small, kernel.inputs, kernel.outputs)
  return small, jnp.squeeze(scale, axes)


def _kernels(cfg: ScarConfig) -> list[_Kernel]:
  """Every `Dense` that the model calls."""
  found: dict[tuple[str, ...], _Kernel] = {}

  def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if isinstance(module, Dense) and context.method_name == '__call__':
      found[module.path] = _Kernel(
        module.path, module.in_dims, len(module.features), module.dtype
      )
    return call(*args, **kwargs)

  rngs = {'params': jax.random.key(0), 'order': jax.random.key(0)}
  tokens = jnp.zeros((1, cfg.make_order().num_targets), jnp.int32)
  with nn.intercept_methods(note):
    jax.eval_shape(
      lambda: Scar(cfg).init(
        rngs,
        tokens,
        empty_conditions(cfg, 1),
        accumulate=blank(cfg.patch_nums, cfg.latent_dim),
      )
    )
  return list(found.values())
