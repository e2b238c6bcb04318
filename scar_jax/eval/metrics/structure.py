"""Structure distance of PIE-Bench: do two pictures have the same layout?

In: pictures, and an encoder artifact of DINO v1's ViT-B/8. Out: the mean
squared difference of the self-similarities of their last keys. Called by
`pie.py`. Source: cure-lab/PnPInversion, method 10.4.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from scar_jax.artifacts import load_artifact
from scar_jax.models.encoders.semantic import NORMALIZE
from scar_jax.models.encoders.vit import ViT
from scar_jax.models.resize import resize
from scar_jax.types import PyTree

SIDE = 224  # pixels that the network sees
_LEAST = 1e-8  # product of two norms


def self_similarity(keys: Float[Array, 'B L D']) -> Float[Array, 'B L L']:
  """Cosines of all pairs of positions; a zero key is similar to none."""
  norms = jnp.linalg.norm(keys, axis=-1)
  products = norms[:, :, None] * norms[:, None, :]
  dots = jnp.einsum('bld,bmd->blm', keys, keys)
  return dots / jnp.maximum(products, _LEAST)


def key_distance(
  a: Float[Array, 'B L D'], b: Float[Array, 'B L D']
) -> Float[Array, ' B']:
  """Mean squared difference of the two self-similarities."""
  gap = self_similarity(a) - self_similarity(b)
  return jnp.mean(gap**2, axis=(1, 2))


class Structure:
  """The distance by one network.

  Args:
    artifact: of `scar convert vit` on DINO v1 B/8.
    antialias: as torchvision 0.17 and later resize; the published numbers were
      made without.

  Raises:
    ValueError: another kind of encoder.
  """

  def __init__(self, artifact: str, antialias: bool = False):
    part = load_artifact(artifact, kind='encoder')
    if part.config.kind != 'vit':
      raise ValueError(
        f'--dino={artifact!r} is an encoder of kind {part.config.kind!r}; '
        "accepted: 'vit', DINO v1 B/8 through scar convert vit"
      )
    network: Any = ViT(part.config.network())
    self._params: PyTree = part.params['network']
    mode = 'bilinear_aa' if antialias else 'bilinear'
    mean, std = (jnp.asarray(x) for x in NORMALIZE['imagenet'])

    @jax.jit
    def keys(params: PyTree, pictures: jax.Array) -> jax.Array:
      x = resize(pictures.astype(jnp.float32), (SIDE, SIDE), mode)
      # The reference forgets to divide by 255, and all published numbers with
      # it: the network sees values up to 1,100.
      x = (x - mean) / std
      return network.apply({'params': params}, x, method='last_keys')

    self._keys = keys

  def __call__(
    self,
    source: UInt8[np.ndarray, 'H W 3'],
    edited: UInt8[np.ndarray, 'H W 3'],
  ) -> float:
    """Distance of two pictures of one size."""
    keys = self._keys(self._params, jnp.asarray(np.stack([source, edited])))
    return float(key_distance(keys[:1], keys[1:])[0])
