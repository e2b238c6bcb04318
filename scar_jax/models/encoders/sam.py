"""SAM's image encoder: attention in windows, with relative positions.

In: normalised images `[B, H, W, 3]`, sides divisible by the patch. Out: tokens
of the grid (there is no class token) and the map behind the neck. Layers with
whole-image attention have larger position tables than the others, so the
layers are not stacked. Source: facebookresearch/segment-anything
`ImageEncoderViT`, method 5.4.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scar_jax.models.encoders import blocks
from scar_jax.models.layers import layer_norm
from scar_jax.models.resize import resize_matrix
from scar_jax.models.tokenizers.layers import Conv
from scar_jax.sharding import annotated, constrain


@dataclasses.dataclass(frozen=True)
class SAMConfig:
  """Sizes; the defaults are B."""

  patch: int = 16  # pixels
  width: int = 768  # features D
  depth: int = 12  # layers
  heads: int = 12
  hidden: int = 0  # width of the feed-forward; 0: 4 D
  table: int = 64  # side of the position table: 1024 pixels
  window: int = 14  # patches; side of a window of attention
  global_layers: tuple[int, ...] = (2, 5, 8, 11)  # these see the whole image
  neck: int = 256  # channels behind the neck; 0: no neck, as features need none
  pos_interp: str = 'offset0.1'  # see blocks.fit_positions
  norm_eps: float = 1e-6
  dtype: str = 'float32'  # of matrix products

  def __post_init__(self):
    if self.width % self.heads:
      raise ValueError(
        f'SAM width={self.width} is not divisible by heads={self.heads}; '
        'accepted: a divisor (set --config.model.heads)'
      )
    if self.window < 1:
      raise ValueError(
        f'SAM window={self.window}; accepted: 1 or more patches '
        '(set --config.model.window)'
      )
    blocks.check_layers(self.global_layers, self.depth)


_SIZES: dict[str, dict[str, Any]] = {
  'B': {},
  'L': dict(width=1024, depth=24, heads=16, global_layers=(5, 11, 17, 23)),
  'H': dict(width=1280, depth=32, heads=16, global_layers=(7, 15, 23, 31)),
}
SAM_SIZES = tuple(_SIZES)


def sam_config(size: str, **overrides: Any) -> SAMConfig:
  """A config by size name, a value of `SAM_SIZES`.

  Raises:
    ValueError: unknown size.
  """
  if size not in _SIZES:
    raise ValueError(f'SAM size {size!r}; accepted: {", ".join(_SIZES)}')
  return SAMConfig(**(_SIZES[size] | overrides))


@flax.struct.dataclass
class SAMOutput:
  """What the encoder gives, tokens row-major.

  Attributes:
    patches: after the last layer and a norm without parameters.
    prenorm: before that norm.
    layers: raw outputs of the wanted layers.
    neck: the map that SAM's decoder reads; None without a neck.
  """

  patches: Float[Array, 'B N D']
  prenorm: Float[Array, 'B N D']
  layers: Float[Array, 'n B N D']
  neck: Float[Array, 'B h w O'] | None


def to_windows(
  x: Float[Array, 'B h w D'], window: int
) -> Float[Array, 'M n n D']:
  """Windows row-major, zeros below and right of the map filling the last."""
  B, h, w, D = x.shape
  n = window
  x = jnp.pad(x, ((0, 0), (0, -h % n), (0, -w % n), (0, 0)))
  rows, cols = x.shape[1] // n, x.shape[2] // n
  x = x.reshape(B, rows, n, cols, n, D).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(-1, n, n, D)


def from_windows(
  x: Float[Array, 'M n n D'], grid: tuple[int, int]
) -> Float[Array, 'B h w D']:
  """The inverse of `to_windows`; what the filling became is cut off."""
  (h, w), n, D = grid, x.shape[1], x.shape[-1]
  rows, cols = -(-h // n), -(-w // n)
  x = x.reshape(-1, rows, cols, n, n, D).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(-1, rows * n, cols * n, D)[:, :h, :w]


def relative_rows(
  table: Float[Array, 'M K'], count: int
) -> Float[Array, 'n n K']:
  """Row `[i, j]` is for a query at i and a key at j, of `count` places.

  A table for another count is resized along its offsets, linearly.
  """
  size = 2 * count - 1
  if table.shape[0] != size:
    matrix = resize_matrix(table.shape[0], size, 'bilinear')
    table = jnp.matmul(matrix, table, precision=jax.lax.Precision.HIGHEST)
  places = np.arange(count)
  return table[places[:, None] - places[None] + count - 1]


class _Attention(nn.Module):
  """Attention within a map, a term per axis for where a key lies."""

  heads: int
  table: int
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, 'B h w D']) -> Float[Array, 'B h w D']:
    B, h, w, D = x.shape
    H, K = self.heads, D // self.heads
    q, k, v = blocks.linear(
      (3, H, K), ('embed', None, 'heads', 'head_dim'),
      dtype=self.dtype, apart=True, name='qkv',
    )(x)  # fmt: skip
    zeros = annotated(nn.initializers.zeros, None, 'head_dim')
    rel_h, rel_w = (
      relative_rows(
        self.param(f'rel_{axis}', zeros, (2 * self.table - 1, K)), count
      ).astype(self.dtype)
      for axis, count in (('h', h), ('w', w))
    )
    # The position terms read q as it is: only q k is scaled.
    f32 = dict(preferred_element_type=jnp.float32)
    bias_h = jnp.einsum('bijnk,iuk->bniju', q, rel_h, **f32)
    bias_w = jnp.einsum('bijnk,juk->bniju', q, rel_w, **f32)
    bias = bias_h[..., :, None] + bias_w[..., None, :]
    q, k, v = (x.reshape(B, h * w, H, K) for x in (q, k, v))
    x = blocks.biased_attention(
      q, k, v, K**-0.5, bias.reshape(B, H, h * w, h * w)
    )
    x = blocks.linear(
      (D,), ('heads', 'head_dim', 'embed'), dtype=self.dtype, name='out'
    )(x)
    return x.reshape(B, h, w, D)


class _Block(nn.Module):
  cfg: SAMConfig
  whole: bool  # attends over the whole image

  @nn.compact
  def __call__(self, x: Float[Array, 'B h w D']) -> Float[Array, 'B h w D']:
    cfg = self.cfg
    grid, kw = x.shape[1:3], dict(dtype=cfg.dtype)
    y = blocks.LayerNorm(cfg.norm_eps, name='norm1', **kw)(x)
    table = cfg.table if self.whole else cfg.window
    attn = _Attention(cfg.heads, table, cfg.dtype, name='attn')
    if self.whole:
      y = attn(y)
    else:
      # The filling is not masked: its keys and values are the biases.
      y = from_windows(attn(to_windows(y, cfg.window)), grid)
    x = (x + y).astype(x.dtype)
    y = blocks.LayerNorm(cfg.norm_eps, name='norm2', **kw)(x)
    mlp = blocks.Mlp(cfg.hidden or 4 * cfg.width, name='mlp', **kw)
    y = mlp(y.reshape(y.shape[0], -1, cfg.width)).reshape(x.shape)
    x = (x + y).astype(x.dtype)
    return constrain(x, 'batch', None, None, 'act_embed')


class SAM(nn.Module):
  """Image encoder with absolute and relative positions."""

  cfg: SAMConfig

  def setup(self):
    cfg = self.cfg
    self.patch_embed = blocks.PatchEmbed(
      cfg.patch, cfg.width, dtype=cfg.dtype, name='patch_embed'
    )
    self.pos_embed = self.param(
      'pos_embed',
      annotated(blocks.INIT, None, None, 'embed'),
      (cfg.table, cfg.table, cfg.width),
    )
    self.blocks = [
      _Block(cfg, i in cfg.global_layers, name=f'layers_{i}')
      for i in range(cfg.depth)
    ]
    if cfg.neck:
      self.neck_conv1 = Conv(
        cfg.neck, 1, padding=((0, 0), (0, 0)), use_bias=False,
        dtype=cfg.dtype, name='neck_conv1',
      )  # fmt: skip
      self.neck_conv2 = Conv(
        cfg.neck, use_bias=False, dtype=cfg.dtype, name='neck_conv2'
      )
      self.neck_norm1 = blocks.LayerNorm(cfg.norm_eps, name='neck_norm1')
      self.neck_norm2 = blocks.LayerNorm(cfg.norm_eps, name='neck_norm2')

  def embed(self, images: Float[Array, 'B H W 3']) -> Float[Array, 'B h w D']:
    """What enters the first layer."""
    cfg = self.cfg
    grid = blocks.patch_grid(images.shape[1:3], cfg.patch)
    table = jnp.asarray(self.pos_embed, jnp.float32)
    positions = blocks.fit_positions(table, grid, cfg.pos_interp)
    x = (self.patch_embed(images) + positions).astype(cfg.dtype)
    return constrain(x, 'batch', None, None, 'act_embed')

  def norm(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    """The norm of features; the network itself ends without one."""
    return layer_norm(x, self.cfg.norm_eps)

  def __call__(
    self, images: Float[Array, 'B H W 3'], layers: tuple[int, ...] = ()
  ) -> SAMOutput:
    """Runs all layers.

    Args:
      images: normalised.
      layers: indices, from 0, of the layers whose raw outputs are wanted.

    Raises:
      ValueError: a side that the patch does not divide; an unknown layer.
    """
    cfg = self.cfg
    blocks.check_layers(layers, cfg.depth)
    x = self.embed(images)

    def tokens(x: jax.Array) -> jax.Array:
      return x.reshape(x.shape[0], -1, cfg.width)

    kept = {}
    for i, block in enumerate(self.blocks):
      x = block(x)
      kept[i] = tokens(x)
    wanted = jnp.zeros((0, *tokens(x).shape), x.dtype)
    neck = None
    if cfg.neck:
      neck = self.neck_norm1(self.neck_conv1(x))
      neck = self.neck_norm2(self.neck_conv2(neck))
    return SAMOutput(
      patches=self.norm(tokens(x)),
      prenorm=tokens(x),
      layers=jnp.stack([kept[i] for i in layers]) if layers else wanted,
      neck=neck,
    )
