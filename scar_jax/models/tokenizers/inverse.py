"""A local tokenizer that starts as its own inverse.

In: fresh parameters of a `VQModel` with `local` and `skip`. Out: the same tree,
whose decoder undoes its encoder. Called by the tokenizer task. Ours: training
then only mends what the codes lose.
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
    params: of `VQModel.init`, with or without logical axes.
  """
  plain = nn.unbox(params)

  def turned(kernel: jax.Array) -> jax.Array:
    return kernel.swapaxes(-1, -2)

  encoder, decoder = plain['encoder'], dict(plain['decoder'])
  decoder['skip'] = decoder['skip'] | {
    'kernel': turned(encoder['local']['kernel'])
  }
  decoder['conv_out'] = jax.tree.map(jnp.zeros_like, decoder['conv_out'])
  post = plain['post_quant_conv'] | {
    'kernel': turned(plain['quant_conv']['kernel'])
  }
  new = {**plain, 'decoder': decoder, 'post_quant_conv': post}
  return nn.meta.replace_boxed(params, new)
