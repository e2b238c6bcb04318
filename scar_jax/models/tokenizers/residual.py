"""Parts of multi-scale residual quantisation: phi, the nearest code, resizes.

In: latents `[B, h, w, C]` and the side of each scale. Out: ids of a scale, and
the map that its codes add to the running latent. `msvq.py` puts them together.
Everything runs in float32. Source: FoundationVision/VAR `VectorQuantizer2`
(method 2.3).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scar_jax.models.resize import resize
from scar_jax.models.tokenizers import layers
from scar_jax.models.tokenizers.vq import normalize

# Scales 2 and 7 of 10 lie exactly between two modules: rounding decided, once.
_PUBLISHED = {
  (10, 4): (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
  (14, 4): (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
}


def phi_picks(scales: int, modules: int) -> tuple[int, ...]:
  """Which of the shared phi modules each scale uses: the nearest centre.

  Args:
    scales: S; scale k lies at k / (S - 1).
    modules: K; their centres are evenly spaced in (0, 1), for K = 4 from 1/12
      on, else from 1/(2 K) on.
  """
  if (scales, modules) in _PUBLISHED:
    return _PUBLISHED[scales, modules]
  edge = 1 / (3 if modules == 4 else 2) / modules
  centres = np.linspace(edge, 1 - edge, modules)
  places = np.arange(scales) / max(scales - 1, 1)
  distance = np.abs(centres - places[:, None])
  return tuple(int(i) for i in distance.argmin(axis=1))


class Phi(nn.Module):
  """`(1 - ratio) x + ratio conv3x3(x)`."""

  ratio: float
  impl: str = 'auto'

  @nn.compact
  def __call__(self, x: Float[Array, 'B h w C']) -> Float[Array, 'B h w C']:
    """Same shape."""
    y = layers.Conv(x.shape[-1], impl=self.impl, name='conv')(x)
    return (1 - self.ratio) * x + self.ratio * y


def nearest_code(
  x: Float[Array, 'B h w C'],
  codebook: Float[Array, 'V C'],
  cosine: bool = False,
) -> Int[Array, 'B n']:
  """Ids of the nearest codes, row-major.

  Args:
    x: latents.
    codebook: raw codes.
    cosine: nearest by angle, instead of by Euclidean distance.
  """
  if cosine:
    x, codebook = normalize(x), normalize(codebook)
  dots = jnp.einsum(
    'bhwc,vc->bhwv', x, codebook, precision=jax.lax.Precision.HIGHEST
  )
  # |x|^2 is the same for every code.
  gap = jnp.sum(jnp.square(codebook), -1) - 2.0 * dots
  ids = jnp.argmax(dots, -1) if cosine else jnp.argmin(gap, -1)
  return ids.astype(jnp.int32).reshape(ids.shape[0], -1)


def enlarge(codes: Float[Array, 'B n C'], side: int) -> Float[Array, 'B h w C']:
  """Codes of one scale as a map of `side` x `side`, bicubic (a = -0.75)."""
  batch, count, channels = codes.shape
  own = round(count**0.5)
  x = codes.reshape(batch, own, own, channels)
  return x if own == side else resize(x, (side, side), 'bicubic')


def shrink(x: Float[Array, 'B h w C'], side: int) -> Float[Array, 'B s s C']:
  """Adaptive average pooling to `side` x `side`."""
  return x if x.shape[1] == side else resize(x, (side, side), 'area')
