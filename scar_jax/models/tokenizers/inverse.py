"""A local tokenizer that starts as its own inverse.

In: fresh parameters of a `VQModel` or `MSVQModel` with `local` and `skip`. Out:
the same tree, whose decoder undoes its encoder. Called by the tokenizer task.
Ours: training then only mends what the codes lose.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def start_inverse(params: Any) -> Any:
  """Fresh parameters of a local model whose decoder undoes its encoder.

  Both are isometries at first, so that their transposes do it; the deep path
  of the decoder starts at zero and has only what codes lose to make up for.

  Args:
    params: of `VQModel.init` or `MSVQModel.init`, with or without logical axes.
      What the latter's phis do to codes starts as nothing.
  """
  plain = nn.unbox(params)

  def turned(kernel: jax.Array) -> jax.Array:
    return kernel.swapaxes(-1, -2)

  encoder, decoder = plain['encoder'], dict(plain['decoder'])
  decoder['skip'] = decoder['skip'] | {
    'kernel': turned(encoder['local']['kernel'])
  }
  decoder['conv_out'] = jax.tree.map(jnp.zeros_like, decoder['conv_out'])
  new = {**plain, 'decoder': decoder}
  phis = [name for name in plain if name.startswith('phi_')]
  if phis:  # a `MSVQModel`, whose quantising convolutions are 3x3 as well
    for name in ('quant_conv', 'post_quant_conv'):
      new[name] = _same(plain[name])
  else:
    kernel = turned(plain['quant_conv']['kernel'])
    new['post_quant_conv'] = plain['post_quant_conv'] | {'kernel': kernel}
  for name in phis:
    new[name] = {'conv': _same(plain[name]['conv'])}
  return nn.meta.replace_boxed(params, new)


def _same(conv: Any) -> Any:
  """A 3x3 convolution that returns its input."""
  kernel = jnp.zeros_like(conv['kernel'])
  kernel = kernel.at[1, 1].set(jnp.eye(kernel.shape[-1], dtype=kernel.dtype))
  return {'kernel': kernel, 'bias': jnp.zeros_like(conv['bias'])}
