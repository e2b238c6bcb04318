"""The plain vision transformer: AugReg's ViT and DINO v1.

In: normalised images `[B, H, W, 3]`, sides divisible by the patch. Out: as of
`dinov2.py`, whose network this is without LayerScale and with positions
interpolated by size; also the last layer's keys, for scores of structure.
Source: huggingface/transformers `ViTModel`, method 5.4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scar_jax.models.encoders import blocks
from scar_jax.models.encoders.dinov2 import DINOv2, DINOv2Config
from scar_jax.sharding import unbox


@dataclasses.dataclass(frozen=True)
class ViTConfig(DINOv2Config):
  """Sizes; the defaults are B/16 at 384 pixels."""

  patch: int = 16  # pixels
  table: int = 24  # side of the position table
  layerscale: bool = False
  pos_interp: str = 'size'
  pooler: bool = False  # tanh layer on the class token; features need none


_SIZES: dict[str, dict[str, Any]] = {
  'S/16': dict(width=384, heads=6),
  'B/16': {},
  'L/16': dict(width=1024, depth=24, heads=16),
  # DINO v1, at 224 pixels.
  'S/8': dict(width=384, heads=6, patch=8, table=28),
  'B/8': dict(patch=8, table=28),
}
VIT_SIZES = tuple(_SIZES)


def vit_config(size: str, **overrides: Any) -> ViTConfig:
  """A config by size name, a value of `VIT_SIZES`.

  Raises:
    ValueError: unknown size.
  """
  if size not in _SIZES:
    raise ValueError(f'ViT size {size!r}; accepted: {", ".join(_SIZES)}')
  return ViTConfig(**(_SIZES[size] | overrides))


class ViT(DINOv2):
  """`DINOv2` in the form of a `ViTConfig`, and what scores read from it."""

  cfg: ViTConfig

  def setup(self):
    super().setup()
    if self.cfg.pooler:
      self.pooler = blocks.linear(
        (self.cfg.width,), ('embed', None), name='pooler'
      )

  def pool(self, images: Float[Array, 'B H W 3']) -> Float[Array, 'B D']:
    """Hugging Face's pooled class token: `tanh(pooler(cls))`.

    Raises:
      ValueError: the config has no pooler.
    """
    if not self.cfg.pooler:
      raise ValueError(
        'ViT pooler=False has no pooled output; accepted: pooler=True in '
        'ViTConfig, with a checkpoint that holds pooler.dense'
      )
    return jnp.tanh(self.pooler(self(images).cls))

  def last_keys(self, images: Float[Array, 'B H W 3']) -> Float[Array, 'B L D']:
    """Keys of the last layer, class token first, heads concatenated.

    The structure distance of PIE-Bench compares them (DINO v1, B/8).
    """
    cfg = self.cfg
    if cfg.depth > 1:
      x = self(images, layers=(cfg.depth - 2,)).layers[0]
    else:
      x = self.embed(images)
    stack = unbox(self.variables['params']['layers'])
    norm, qkv = (
      jax.tree.map(lambda p: p[-1], tree)
      for tree in (stack['norm1'], stack['attn']['qkv'])
    )
    layer_norm = blocks.LayerNorm(cfg.norm_eps, dtype=cfg.dtype, parent=None)
    x = layer_norm.apply({'params': norm}, x)
    kernel, bias = (qkv[n].astype(cfg.dtype) for n in ('kernel', 'bias'))
    keys = jnp.einsum('bld,dhk->blhk', x, kernel[:, 1]) + bias[1]
    return keys.reshape(*keys.shape[:2], cfg.width)
