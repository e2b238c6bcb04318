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


class _Block(nn.Module):
  cfg: DINOv2Config

  @nn.compact
  def __call__(self, carry, slot):
    cfg = self.cfg
    x, kept = carry

    def branch(name, body, x):
      norm = blocks.LayerNorm(cfg.norm_eps, dtype=cfg.dtype, name=f'norm{name}')
      y = body(norm(x))
      if cfg.layerscale:
        init = nn.initializers.constant(cfg.layerscale_init)
        size = (cfg.width,)
        y = y * self.param(f'ls{name}', annotated(init, None), size)
      return (x + y).astype(x.dtype)

    attn = blocks.SelfAttention(cfg.heads, cfg.dtype, name='attn')
    if cfg.ffn == 'swiglu':
      hidden = (8 * cfg.width // 3 + 7) // 8 * 8
      mlp = blocks.SwiGLU(hidden, cfg.dtype, name='mlp')
    else:
      mlp = blocks.Mlp(4 * cfg.width, dtype=cfg.dtype, name='mlp')
    x = branch('1', attn, x)
    x = branch('2', mlp, x)
    x = constrain(x, 'batch', None, 'act_embed')
    # Only the wanted outputs take memory; other layers name no slot.
    if kept.shape[0]:
      kept = kept.at[slot].set(x, mode='drop')
    return (x, kept), None


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
    self.layers = nn.scan(
      _Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=cfg.depth,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(cfg, name='layers')
    self.norm = blocks.LayerNorm(cfg.norm_eps, name='norm')

  def positions(self, grid: tuple[int, int]) -> Float[Array, 'L D']:
    """Position rows of the class token, then of the patches of a grid."""
    cfg = self.cfg
    rows = jnp.asarray(self.pos_embed, jnp.float32)
    table = rows[1:].reshape(cfg.table, cfg.table, -1)
    table = blocks.fit_positions(table, grid, cfg.pos_interp)
    return jnp.concatenate([rows[:1], table.reshape(-1, cfg.width)])

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
    cfg = self.cfg
    wrong = [i for i in layers if not 0 <= i < cfg.depth]
    if wrong:
      raise ValueError(
        f'layer {wrong} of {cfg.depth}; accepted: 0 to {cfg.depth - 1}'
      )
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
    x = constrain(x.astype(cfg.dtype), 'batch', None, 'act_embed')
    slots = [layers.index(i) if i in layers else len(layers)
             for i in range(cfg.depth)]  # fmt: skip
    kept = jnp.zeros((len(layers), *x.shape), x.dtype)
    (x, kept), _ = self.layers((x, kept), jnp.array(slots))
    normed = self.norm(x)
    first = 1 + cfg.registers
    return ViTOutput(
      cls=normed[:, 0],
      registers=normed[:, 1:first],
      patches=normed[:, first:],
      prenorm=x,
      layers=kept,
    )
