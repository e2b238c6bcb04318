"""The PatchGAN discriminator of the tokenizer's training.

In: images `[B, H, W, 3]` in [-1, 1]. Out: one score per patch
`[B, h, w, 1]`, high for real. Only `train/tasks/tokenizer.py` uses it; sizes
and initialisation are those of FoundationVision/LlamaGen (method 2.1).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scar_jax.models.tokenizers.layers import Conv
from scar_jax.sharding import annotated


def _scale_init(key, shape, dtype=jnp.float32):
  return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class PatchDiscriminator(nn.Module):
  """4x4 convolutions: `layers` of stride 2, then two of stride 1.

  Batch statistics live in the collection 'batch_stats' and span the whole
  (global) batch. An image side must be at least `4 * 2**layers`.
  """

  ch: int = 64
  layers: int = 3
  impl: str = 'auto'
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, images: Float[Array, 'B H W C'], train: bool
  ) -> Float[Array, 'B h w S']:
    least = 4 * 2**self.layers
    if min(images.shape[1:3]) < least:
      raise ValueError(
        f'image size {images.shape[1]}x{images.shape[2]} is too small for a '
        f'discriminator of {self.layers} layers; accepted: {least} or more '
        '(set `loss.gan_layers` or `data.image_size`)'
      )
    kw = dict(
      window=4,
      impl=self.impl,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(0.02),
    )
    x = Conv(self.ch, stride=2, name='conv_0', **kw)(images)
    x = nn.leaky_relu(x, 0.2)
    for n in range(1, self.layers + 1):
      stride = 2 if n < self.layers else 1
      width = self.ch * min(2**n, 8)
      x = Conv(width, stride=stride, use_bias=False, name=f'conv_{n}', **kw)(x)
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=jnp.float32,
        scale_init=annotated(_scale_init, None),
        bias_init=annotated(nn.initializers.zeros_init(), None),
        name=f'norm_{n}',
      )(x)
      x = nn.leaky_relu(x, 0.2)
    x = Conv(1, name=f'conv_{self.layers + 1}', **kw)(x)
    return x.astype(jnp.float32)
