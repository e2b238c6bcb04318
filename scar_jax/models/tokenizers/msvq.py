"""VAR's multi-scale tokenizer: images to token ids of several scales, and back.

In: images `[B, H, W, 3]` in [-1, 1], of `cfg.image_size` pixels. Out: ids
`[B, N]` of all scales, concatenated from small to large, latents and images
(unclamped). `accumulate` is what `orders/scale.py` asks of a tokenizer. The
structure is that of FoundationVision/VAR `VQVAE` (method 2.2, 2.3); its names
are in convert/var_vqvae.py.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scar_jax.models.tokenizers import layers, residual
from scar_jax.models.tokenizers.vq import (
  Decoder,
  Encoder,
  VQConfig,
  codebook_init,
  straight_through,
)
from scar_jax.orders.scale import PATCH_NUMS, Accumulate, ScaleOrder
from scar_jax.sharding import annotated
from scar_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class MSVQConfig:
  """Sizes of an `MSVQModel`; the defaults are VAR's at 256 pixels."""

  codes: int = 4096  # V, codebook entries, shared by all scales
  code_dim: int = 32  # C, channels of one code
  patch_nums: tuple[int, ...] = PATCH_NUMS[256]  # sides of the scales
  phis: int = 4  # modules after the enlarged codes, shared by the scales
  phi_ratio: float = 0.5  # share of the convolution in them
  cosine: bool = False  # codes chosen by angle; they are used raw all the same
  ch: int = 160  # base width
  ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # per level, high to low
  res_blocks: int = 2  # per encoder level; the decoder has one more
  groups: int = 32  # of the group norms; 0: norm per position
  attn: bool = True  # attention at the lowest level
  dropout: float = 0.0
  conv_impl: str = 'auto'  # 'auto' | 'xla' | 'matmul'
  dtype: str = 'float32'  # compute, except of the quantiser

  def __post_init__(self):
    _ = self.backbone  # its own checks
    ScaleOrder(tuple(self.patch_nums))
    if self.phis < 1:
      raise ValueError(
        f'tokenizer.phis={self.phis}; accepted: 1 or more (set `phis`)'
      )

  @property
  def backbone(self) -> VQConfig:
    """Encoder and decoder; they are the single-scale tokenizer's."""
    return VQConfig(
      codes=self.codes,
      code_dim=self.code_dim,
      l2_norm=False,
      ch=self.ch,
      ch_mult=tuple(self.ch_mult),
      res_blocks=self.res_blocks,
      z_channels=self.code_dim,
      groups=self.groups,
      attn=self.attn,
      dropout=self.dropout,
      conv_impl=self.conv_impl,
      dtype=self.dtype,
    )

  @property
  def side(self) -> int:
    """Latents per side."""
    return self.patch_nums[-1]

  @property
  def downsample(self) -> int:
    """Pixels per latent and side."""
    return self.backbone.downsample

  @property
  def image_size(self) -> int:
    """Pixels per side."""
    return self.side * self.downsample

  @property
  def set_sizes(self) -> tuple[int, ...]:
    """Tokens of each scale."""
    return tuple(p * p for p in self.patch_nums)

  @property
  def num_tokens(self) -> int:
    """N, tokens of all scales."""
    return sum(self.set_sizes)


_SIZES: dict[str, dict[str, Any]] = {
  f'var{size}': dict(patch_nums=sides) for size, sides in PATCH_NUMS.items()
}


def msvq_config(size: str, **overrides: Any) -> MSVQConfig:
  """A config by size name.

  Args:
    size: 'var256', 'var512' or 'var1024': one public checkpoint (109M
      parameters), scales for images of so many pixels.
    **overrides: fields that differ.

  Raises:
    ValueError: unknown size.
  """
  if size not in _SIZES:
    raise ValueError(
      f'tokenizer size {size!r}; accepted: {sorted(_SIZES)} (set '
      '`tokenizer.size`)'
    )
  return MSVQConfig(**(_SIZES[size] | overrides))


@flax.struct.dataclass
class MSVQOutput:
  """What training needs of one pass.

  Attributes:
    images: reconstruction, unclamped.
    ids: of all scales.
    raw: latent as the encoder gives it.
    partial: sum of the codes up to and with each scale, with gradient to
      codebook and phi.
  """

  images: Float[Array, 'B H W C']
  ids: Int[Array, 'B N']
  raw: Float[Array, 'B h w C']
  partial: Float[Array, 'R B h w C']


class MSVQModel(nn.Module):
  """Encoder, multi-scale residual quantiser, decoder."""

  cfg: MSVQConfig

  def setup(self):
    cfg = self.cfg
    kw = dict(impl=cfg.conv_impl, dtype='float32')
    self.encoder = Encoder(cfg.backbone, name='encoder')
    self.quant_conv = layers.Conv(cfg.code_dim, name='quant_conv', **kw)
    self.post_quant_conv = layers.Conv(
      cfg.code_dim, name='post_quant_conv', **kw
    )
    self.decoder = Decoder(cfg.backbone, name='decoder')
    self.phis = [
      residual.Phi(cfg.phi_ratio, cfg.conv_impl, name=f'phi_{i}')
      for i in range(cfg.phis)
    ]
    self.codebook = self.param(
      'codebook',
      annotated(codebook_init(cfg.backbone), 'vocab', None),
      (cfg.codes, cfg.code_dim),
      jnp.float32,
    )
    self.picks = residual.phi_picks(len(cfg.patch_nums), cfg.phis)

  def features(
    self, images: Float[Array, 'B H W C'], deterministic: bool = True
  ) -> Float[Array, 'B h w C']:
    """Continuous latents before quantisation.

    Raises:
      ValueError: images of another size than the scales are made for.
    """
    size = self.cfg.image_size
    if images.shape[1:3] != (size, size):
      raise ValueError(
        f'image size {images.shape[1]}x{images.shape[2]}; accepted: '
        f'{size}x{size}, {self.cfg.side} latents of {self.cfg.downsample} '
        'pixels (set `data.image_size` or `tokenizer.patch_nums`)'
      )
    h = self.encoder(images, deterministic)
    return self.quant_conv(h.astype(jnp.float32))

  def table(self) -> Float[Array, 'V C']:
    """The codes as used everywhere: raw."""
    return jnp.asarray(self.codebook)

  def lookup(self, ids: Int[Array, '...']) -> Float[Array, '... C']:
    """Codes of ids."""
    return self.table()[ids]

  def spread(
    self, k: int, codes: Float[Array, 'B n C']
  ) -> Float[Array, 'B h w C']:
    """What the codes of scale k (from 0) add to the latent."""
    return self.phis[self.picks[k]](residual.enlarge(codes, self.cfg.side))

  def quantize(
    self, raw: Float[Array, 'B h w C']
  ) -> tuple[Int[Array, 'B N'], Float[Array, 'R B h w C']]:
    """Ids of all scales, and the latent after each of them.

    Every scale codes what the scales before left over, always at full size.
    No gradient reaches `raw`.
    """
    rest, total = jax.lax.stop_gradient(raw), jnp.zeros_like(raw)
    ids, partial = [], []
    for k, side in enumerate(self.cfg.patch_nums):
      ids.append(
        residual.nearest_code(
          residual.shrink(rest, side),
          jax.lax.stop_gradient(self.table()),
          self.cfg.cosine,
        )
      )
      added = self.spread(k, self.lookup(ids[-1]))
      total = total + added
      rest = rest - jax.lax.stop_gradient(added)
      partial.append(total)
    return jnp.concatenate(ids, axis=1), jnp.stack(partial)

  def encode(
    self, images: Float[Array, 'B H W C']
  ) -> tuple[Int[Array, 'B N'], Float[Array, 'B h w C']]:
    """Ids of all scales and the latents that they were made of."""
    raw = self.features(images)
    return self.quantize(raw)[0], raw

  def split(self, ids: Int[Array, 'B N']) -> list[Int[Array, 'B n']]:
    """Ids of each scale.

    Raises:
      ValueError: another number of ids than the scales have.
    """
    sizes = self.cfg.set_sizes
    if ids.shape[1] != sum(sizes):
      raise ValueError(
        f'{ids.shape[1]} ids for scales of sides {self.cfg.patch_nums}; '
        f'accepted: {sum(sizes)} (set `tokenizer.patch_nums`)'
      )
    return jnp.split(ids, np.cumsum(sizes)[:-1], axis=1)

  def accumulate(
    self,
    k: int,
    latent: Float[Array, 'B h w C'] | None,
    ids: Int[Array, 'B n'],
  ) -> tuple[Float[Array, 'B h w C'], Float[Array, 'B m C'] | None]:
    """One step of sampling: adds scale k.

    Args:
      k: scale, from 0.
      latent: sum of the scales before; None before the first.
      ids: of scale k.

    Returns:
      The new sum, and it resized to the next scale, row-major: what the
      decoder sees there. None after the last scale.
    """
    added = self.spread(k, self.lookup(ids))
    latent = added if latent is None else latent + added
    if k + 1 == len(self.cfg.patch_nums):
      return latent, None
    values = residual.shrink(latent, self.cfg.patch_nums[k + 1])
    return latent, values.reshape(values.shape[0], -1, values.shape[-1])

  def tokens_to_latent(
    self, ids: Int[Array, 'B N']
  ) -> tuple[Float[Array, 'B h w C'], list[Float[Array, 'B m C']]]:
    """The whole sum, and the decoder's inputs at the scales after the first."""
    latent, values = None, []
    for k, part in enumerate(self.split(ids)):
      latent, here = self.accumulate(k, latent, part)
      values.append(here)
    return latent, values[:-1]

  def tokens_to_inputs(self, ids: Int[Array, 'B N']) -> Float[Array, 'B m C']:
    """Teacher-forcing inputs of all scales after the first, concatenated."""
    values: Sequence[jax.Array] = self.tokens_to_latent(ids)[1]
    if not values:
      return jnp.zeros((ids.shape[0], 0, self.cfg.code_dim))
    return jnp.concatenate(values, axis=1)

  def decode(
    self, latent: Float[Array, 'B h w C'], deterministic: bool = True
  ) -> Float[Array, 'B H W C']:
    """Images of a sum of codes, unclamped."""
    return self.decoder(self.post_quant_conv(latent), deterministic)

  def decode_tokens(self, ids: Int[Array, 'B N']) -> Float[Array, 'B H W C']:
    """Images of ids, unclamped; clip to [-1, 1] for pixels."""
    return self.decode(self.tokens_to_latent(ids)[0])

  def __call__(
    self, images: Float[Array, 'B H W C'], deterministic: bool = True
  ) -> MSVQOutput:
    """The training pass: straight-through codes into the decoder."""
    raw = self.features(images, deterministic)
    ids, partial = self.quantize(raw)
    through = straight_through(raw, partial[-1])
    return MSVQOutput(
      images=self.decode(through, deterministic),
      ids=ids,
      raw=raw,
      partial=partial,
    )


def accumulator(cfg: MSVQConfig, params: PyTree) -> Accumulate:
  """`MSVQModel.accumulate` with its parameters, as the scale order takes it."""
  model = MSVQModel(cfg)
  return functools.partial(model.apply, {'params': params}, method='accumulate')
