"""DINOv2's vision transformer, and the class of the small one trained here.

In: normalised images `[B, H, W, 3]`, sides divisible by the patch. Out: the
class token, registers and patch tokens after the final norm, and the raw
outputs of wanted layers. `encoders/semantic.py` turns them into features.
Source: facebookresearch/dinov2 `DinoVisionTransformer`, method 5.1.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scar_jax.models.encoders import blocks
from scar_jax.sharding import annotated, constrain


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
  """Sizes; the defaults are B/14."""

  patch: int = 14  # pixels
  width: int = 768  # features D
  depth: int = 12  # layers
  heads: int = 12
  ffn: str = 'mlp'  # 'mlp' (4 D) | 'swiglu' (8 D / 3, rounded up to 8)
  table: int = 37  # side of the position table: 518 pixels
  registers: int = 0  # tokens behind the class token, without position
  layerscale: bool = True  # a trained factor per channel on each branch
  layerscale_init: float = 1e-5
  pos_interp: str = 'offset0.1'  # see blocks.fit_positions
  norm_eps: float = 1e-6
  dtype: str = 'float32'  # of matrix products

  def __post_init__(self):
    if self.ffn not in ('mlp', 'swiglu'):
      raise ValueError(
        f'ffn={self.ffn!r}; accepted: mlp, swiglu (set --config.model.ffn)'
      )
    if self.width % self.heads:
      raise ValueError(
        f'width={self.width} is not divisible by heads={self.heads}; '
        'accepted: a divisor (set --config.model.heads)'
      )


_SIZES: dict[str, dict[str, Any]] = {
  'S': dict(width=384, heads=6),
  'B': {},
  'L': dict(width=1024, depth=24, heads=16),
  'g': dict(width=1536, depth=40, heads=24, ffn='swiglu'),
}
# Trained with four registers, whose code interpolates positions otherwise.
_REGISTERS = dict(registers=4, pos_interp='size_aa')
DINOV2_SIZES = (*_SIZES, *(f'{size}_reg' for size in _SIZES))


def dinov2_config(size: str, **overrides: Any) -> DINOv2Config:
  """A config by size name: 'S', 'B', 'L', 'g', or these with '_reg'.

  Raises:
    ValueError: unknown size.
  """
  name = size.removesuffix('_reg')
  if name not in _SIZES:
    raise ValueError(
      f'DINOv2 size {size!r}; accepted: {", ".join(_SIZES)}, each also with '
      '_reg'
    )
  extra = _REGISTERS if size.endswith('_reg') else {}
  return DINOv2Config(**(_SIZES[name] | extra | overrides))


@flax.struct.dataclass
class ViTOutput:
  """What a vision transformer gives.

  Attributes:
    cls: class token after the final norm.
    registers: register tokens after the final norm.
    patches: patch tokens after the final norm, row-major.
    prenorm: all tokens before it: class, registers, patches.
    layers: the same at the output of each wanted layer.
  """

  cls: Float[Array, 'B D']
  registers: Float[Array, 'B R D']
  patches: Float[Array, 'B N D']
  prenorm: Float[Array, 'B L D']
  layers: Float[Array, 'n B L D']


class DINOv2(nn.Module):
  """Vision transformer with class token and learned positions."""

  cfg: DINOv2Config

  def setup(self):
    cfg = self.cfg
    D = cfg.width
    self.patch_embed = blocks.PatchEmbed(
      cfg.patch, D, dtype=cfg.dtype, name='patch_embed'
    )
    small = nn.initializers.normal(1e-6)
    self.cls_token = self.param('cls_token', annotated(small, None), (D,))
    if cfg.registers:
      self.registers = self.param(
        'registers', annotated(small, None, None), (cfg.registers, D)
      )
    self.pos_embed = self.param(
      'pos_embed', annotated(blocks.INIT, None, None), (1 + cfg.table**2, D)
    )
    swiglu = cfg.ffn == 'swiglu'
    self.layers = blocks.make_layers(
      self,
      cfg.depth,
      heads=cfg.heads,
      hidden=(8 * D // 3 + 7) // 8 * 8 if swiglu else 4 * D,
      ffn=cfg.ffn,
      layerscale=cfg.layerscale_init if cfg.layerscale else None,
      norm_eps=cfg.norm_eps,
      dtype=cfg.dtype,
    )
    self.norm = blocks.LayerNorm(cfg.norm_eps, name='norm')

  def positions(self, grid: tuple[int, int]) -> Float[Array, 'L D']:
    """Position rows of the class token, then of the patches of a grid."""
    cfg = self.cfg
    return blocks.token_positions(
      self.pos_embed, cfg.table, grid, cfg.pos_interp
    )

  def embed(
    self,
    images: Float[Array, 'B H W 3'],
    hidden: Bool[Array, 'B N'] | None = None,
    mask_token: Float[Array, ' D'] | None = None,
  ) -> Float[Array, 'B L D']:
    """What enters the first layer; arguments as of a call."""
    cfg = self.cfg
    grid = blocks.patch_grid(images.shape[1:3], cfg.patch)
    B, D = images.shape[0], cfg.width
    x = self.patch_embed(images).reshape(B, -1, D)
    if hidden is not None:
      x = jnp.where(hidden[..., None], mask_token, x)
    cls = jnp.broadcast_to(self.cls_token, (B, 1, D))
    x = jnp.concatenate([cls, x], axis=1) + self.positions(grid)
    if cfg.registers:
      extra = jnp.broadcast_to(self.registers, (B, cfg.registers, D))
      x = jnp.concatenate([x[:, :1], extra, x[:, 1:]], axis=1)
    return constrain(x.astype(cfg.dtype), 'batch', None, 'act_embed')

  def __call__(
    self,
    images: Float[Array, 'B H W 3'],
    hidden: Bool[Array, 'B N'] | None = None,
    mask_token: Float[Array, ' D'] | None = None,
    layers: tuple[int, ...] = (),
  ) -> ViTOutput:
    """Runs all layers.

    Args:
      images: normalised.
      hidden: patches that the encoder must not see, in masked training.
      mask_token: what stands in their place.
      layers: indices, from 0, of the layers whose raw outputs are wanted.

    Raises:
      ValueError: a side that the patch does not divide; an unknown layer.
    """
    x = self.embed(images, hidden, mask_token)
    x, kept = blocks.run_layers(self.layers, x, self.cfg.depth, layers)
    normed = self.norm(x)
    first = 1 + self.cfg.registers
    return ViTOutput(
      cls=normed[:, 0],
      registers=normed[:, 1:first],
      patches=normed[:, first:],
      prenorm=x,
      layers=kept,
    )
