"""Compressed semantic prefill: encoder features -> a short prefix, and back.

In: frozen features `[B, h, w, d]` of the condition image (or embeddings of its
tokens). Out: compressed features `[B, h/k, w/k, d']`, restored features for the
preservation loss, prefix embeddings `[B, P, D]`. Called by `models/scar.py`.
Source: SCAR (arXiv 2511.14063) and AMAP-ML/SCAR; the ablation variants too.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scar_jax.models.convolutions import batch_conv, product_conv
from scar_jax.models.layers import layer_norm, place_waves
from scar_jax.orders.layout import grid_positions
from scar_jax.sharding import annotated, platform

COMPRESS = (
  'full',  # conv + resize, with a restorer for the preservation loss
  'conv_resize',  # conv + resize
  'conv',  # conv alone, with a restorer
  'resize',  # bilinear, half-pixel, no antialias
  'unshuffle',  # every k x k block becomes channels
  'none',  # the features as they are
  'vq',  # embeddings of the source image's tokens (EditAR)
  'vq_pool',  # those embeddings through conv + resize
  'off',  # no prefix at all
)
NORMS = ('none', 'layernorm')
INJECT = ('prefill', 'fusion', 'cross')
_PLACE_RMS = 0.5  # beside embeddings of unit RMS
_WITH_CONV = ('full', 'conv_resize', 'conv', 'vq_pool')
_WITH_RESIZE = ('full', 'conv_resize', 'resize', 'vq_pool')


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
  """The prefix.

  Attributes:
    compress: a value of `COMPRESS`.
    k: linear compression, 1, 2 or 4; 1 leaves the features as they are.
    grid: (h, w) of the features, or of the source tokens for the vq kinds.
    width: feature width d; the vq kinds have the decoder's.
    out: decoder width D.
    norm: 'none' or 'layernorm' (without scale or bias), after the projection.
    places: 'none', or 'sincos' adds where each position lies in the picture,
      to what an encoder trained for a few minutes may not tell.
    null: 'learned' or 'fixed' null prefix of the joint condition dropout.
    inject: 'prefill' puts the compressed features into the sequence. The others
      are baselines without a prefix, see `inject.py`: 'fusion' and 'cross'
      bring the features into some of the decoder's blocks.
    dtype: of convolutions and projection.
  """

  compress: str = 'full'
  k: int = 2
  grid: tuple[int, int] = (32, 32)
  width: int = 3072
  out: int = 1280
  norm: str = 'none'
  places: str = 'none'
  null: str = 'learned'
  inject: str = 'prefill'
  dtype: str = 'float32'

  def __post_init__(self):
    accepted = {
      'compress': COMPRESS,
      'k': (1, 2, 4),
      'norm': NORMS,
      'places': ('none', 'sincos'),
      'null': ('learned', 'fixed'),
      'inject': INJECT,
    }
    for name, values in accepted.items():
      if getattr(self, name) not in values:
        raise ValueError(
          f'prefix.{name}={getattr(self, name)!r}; accepted: '
          f'{", ".join(map(str, values))} (set --config.prefix.{name})'
        )
    h, w = self.grid
    if h % self.step or w % self.step:
      fitting = [k for k in (1, 2, 4) if not (h % k or w % k)]
      raise ValueError(
        f'prefix.k={self.k} does not divide the feature grid {h}x{w}; '
        f'accepted: {", ".join(map(str, fitting))} '
        '(set --config.prefix.k, or the encoder size)'
      )
    if self.from_tokens and self.width != self.out:
      raise ValueError(
        f'prefix.compress={self.compress!r} with width {self.width}; '
        f'accepted: the decoder width {self.out} (it embeds tokens)'
      )
    if self.inject != 'prefill' and self.compress == 'off':
      raise ValueError(
        f"prefix.inject={self.inject!r} with prefix.compress='off', which has "
        "nothing to inject; accepted: 'prefill' (set --config.prefix.inject)"
      )
    if self.inject == 'fusion' and self.step > 1:
      raise ValueError(
        f"prefix.inject='fusion' with prefix.compress={self.compress!r} and "
        f'k={self.k}: each token takes the feature of its own place, and fewer '
        "features save nothing; accepted: k=1 or compress='none' "
        '(set --config.prefix.k or compress)'
      )

  @property
  def step(self) -> int:
    """The compression that really happens, in pixels of the grid."""
    return 1 if self.compress in ('none', 'vq', 'off') else self.k

  @property
  def from_tokens(self) -> bool:
    """The prefix is made of token embeddings, not of encoder features."""
    return self.compress in ('vq', 'vq_pool')

  @property
  def restores(self) -> bool:
    """A restorer exists, so the preservation loss is defined."""
    return self.step > 1 and self.compress in ('full', 'conv')

  @property
  def out_grid(self) -> tuple[int, int] | None:
    """(rows, columns) of the compressed features, None without any."""
    if self.compress == 'off':
      return None
    return self.grid[0] // self.step, self.grid[1] // self.step

  @property
  def length(self) -> int:
    """Compressed features P."""
    return math.prod(self.out_grid) if self.out_grid else 0

  @property
  def seq_grid(self) -> tuple[int, int] | None:
    """(rows, columns) of the prefix in the sequence, None without one."""
    return self.out_grid if self.inject == 'prefill' else None

  @property
  def positions(self) -> int:
    """Positions of the sequence: P, or 0 where the features are injected."""
    return math.prod(self.seq_grid) if self.seq_grid else 0


def torch_uniform(fan_in: int):
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which torch gives every layer."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def pixel_shuffle(
  x: Float[Array, 'B h w rrC'], r: int
) -> Float[Array, 'B rh rw C']:
  """Channels `c r^2 + i r + j` to row i and column j of an r x r block."""
  B, h, w, channels = x.shape
  x = x.reshape(B, h, w, channels // r**2, r, r)
  x = x.transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(B, h * r, w * r, channels // r**2)


def pixel_unshuffle(
  x: Float[Array, 'B rh rw C'], r: int
) -> Float[Array, 'B h w rrC']:
  """The inverse of `pixel_shuffle`."""
  B, h, w, channels = x.shape
  x = x.reshape(B, h // r, r, w // r, r, channels)
  x = x.transpose(0, 1, 3, 5, 2, 4)
  return x.reshape(B, h // r, w // r, channels * r**2)


def shrink(x: Float[Array, 'B h w C'], k: int) -> Float[Array, 'B h2 w2 C']:
  """Bilinear resize to 1/k of the sides, half-pixel, no antialias.

  For an even k the sample point lies between the two middle pixels of each
  axis, so this is the mean of the central 2 x 2 of every k x k block.
  """
  if k == 1:
    return x
  B, h, w, channels = x.shape
  blocks = x.reshape(B, h // k, k, w // k, k, channels)
  middle = slice(k // 2 - 1, k // 2 + 1)
  return jnp.mean(blocks[:, :, middle, :, middle], axis=(2, 4))


def _conv(
  features: int,
  fan_in: int,
  stride: int,
  dtype: str,
  name: str,
  small: bool = True,
):
  """3x3; `small` says that its output is smaller than the features' grid."""
  init = torch_uniform(9 * fan_in)
  # Of the whole grid the values under all taps would be too many.
  conv = product_conv if small and platform() == 'tpu' else batch_conv
  return nn.Conv(
    features,
    (3, 3),
    strides=(stride, stride),
    # Explicit: 'SAME' at stride 2 pads (0, 1) and shifts by one pixel.
    padding=((1, 1), (1, 1)),
    dtype=dtype,
    conv_general_dilated=conv,
    kernel_init=annotated(init, None, None, None, 'conv_out'),
    bias_init=annotated(init, 'conv_out'),
    name=name,
  )


class Downsampler(nn.Module):
  """C_k: log2(k) stacked 3x3 convolutions of stride 2, nothing between."""

  cfg: PrefixConfig

  @nn.compact
  def __call__(self, x: Float[Array, 'B h w d']) -> Float[Array, 'B h2 w2 d']:
    cfg = self.cfg
    for i in range(int(math.log2(cfg.step))):
      x = _conv(cfg.width, cfg.width, 2, cfg.dtype, f'conv{i}')(x)
    return x.astype(jnp.float32)


class Restorer(nn.Module):
  """U_k: log2(k) stages (conv d -> 4d, pixel shuffle), then a 3x3 conv."""

  cfg: PrefixConfig

  @nn.compact
  def __call__(self, x: Float[Array, 'B h2 w2 d']) -> Float[Array, 'B h w d']:
    cfg, d = self.cfg, self.cfg.width
    for i in range(int(math.log2(cfg.step))):
      name = f'conv_in{i or ""}'
      x = pixel_shuffle(_conv(4 * d, d, 1, cfg.dtype, name)(x), 2)
    x = _conv(d, d, 1, cfg.dtype, 'conv_out', small=False)(x)
    return x.astype(jnp.float32)


class Compressor(nn.Module):
  """F_s -> F_c -> prefix, and F_c -> restored F_s."""

  cfg: PrefixConfig

  def setup(self):
    cfg = self.cfg
    if cfg.compress in _WITH_CONV and cfg.step > 1:
      self.down = Downsampler(cfg, name='compress')
    if cfg.restores:
      self.up = Restorer(cfg, name='restore')
    if not cfg.from_tokens:
      inputs = cfg.width
      if cfg.compress == 'unshuffle':
        inputs *= cfg.step**2
      self.proj = nn.Dense(
        cfg.out,
        use_bias=False,
        dtype=cfg.dtype,
        kernel_init=annotated(torch_uniform(inputs), 'mlp', 'embed'),
        name='proj',
      )

  def compress(
    self, features: Float[Array, 'B h w d']
  ) -> Float[Array, 'B h2 w2 d2']:
    """F_c. `d2` is k^2 d for 'unshuffle' and d otherwise.

    Raises:
      ValueError: the features do not have the configured shape.
    """
    cfg = self.cfg
    if features.shape[1:] != (*cfg.grid, cfg.width):
      raise ValueError(
        f'features {features.shape[1:]} do not fit the prefix; accepted: '
        f'{(*cfg.grid, cfg.width)} (set the encoder size or features)'
      )
    features = features.astype(jnp.float32)
    if cfg.step == 1:
      return features
    if cfg.compress == 'unshuffle':
      return pixel_unshuffle(features, cfg.step)
    compressed = 0.0
    if cfg.compress in _WITH_RESIZE:
      compressed += shrink(features, cfg.step)
    if cfg.compress in _WITH_CONV:
      compressed += self.down(features)
    return compressed

  def restore(
    self, compressed: Float[Array, 'B h2 w2 d']
  ) -> Float[Array, 'B h w d']:
    """U_k(F_c), only where `cfg.restores`."""
    return self.up(compressed)

  def project(
    self, compressed: Float[Array, 'B h2 w2 d2']
  ) -> Float[Array, 'B P D']:
    """Prefix embeddings in row-major order, float32."""
    cfg = self.cfg
    x = compressed.reshape(compressed.shape[0], -1, compressed.shape[-1])
    if not cfg.from_tokens:
      x = self.proj(x)
    x = x.astype(jnp.float32)
    if cfg.norm == 'layernorm':
      x = layer_norm(x, 1e-6)
    if cfg.places == 'sincos':
      cells = (grid_positions(cfg.out_grid) + 0.5) / np.array(cfg.out_grid)
      x = x + _PLACE_RMS * place_waves(cells, cfg.out)
    return x

  def __call__(
    self, features: Float[Array, 'B h w d']
  ) -> tuple[Float[Array, 'B P D'], Float[Array, 'B h w d'] | None]:
    """Prefix, and the restored features where a restorer exists."""
    compressed = self.compress(features)
    restored = self.restore(compressed) if self.cfg.restores else None
    return self.project(compressed), restored
