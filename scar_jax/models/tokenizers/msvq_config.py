"""Sizes of VAR's multi-scale tokenizer, and the named ones.

In: fields of a config section. Out: the frozen `MSVQConfig` that `msvq.py`
builds its network from.
"""

import dataclasses
from typing import Any, ClassVar

from scar_jax.models.tokenizers.vq import VQConfig, fields_of_size
from scar_jax.orders.scale import PATCH_NUMS, ScaleOrder


@dataclasses.dataclass(frozen=True)
class MSVQConfig:
  """Sizes of an `MSVQModel`; the defaults are VAR's at 256 pixels."""

  l2_norm: ClassVar[bool] = False  # codes and latents are used raw

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
  patch: int = 1  # pixels per side that enter as channels
  skip: bool = False  # linear paths around encoder and decoder
  local: bool = False  # the encoder sees each latent's pixels alone
  dropout: float = 0.0
  scale_dropout: float = 0.0  # share of training samples cut to first scales
  conv_impl: str = 'auto'  # 'auto' | 'xla' | 'matmul'
  dtype: str = 'float32'  # compute, except of the quantiser

  def __post_init__(self):
    _ = self.backbone  # its own checks
    ScaleOrder(tuple(self.patch_nums))
    if self.phis < 1:
      raise ValueError(
        f'tokenizer.phis={self.phis}; accepted: 1 or more (set `phis`)'
      )
    if not 0 <= self.scale_dropout < 1:
      raise ValueError(
        f'tokenizer.scale_dropout={self.scale_dropout}; accepted: 0 to below 1 '
        '(set `scale_dropout`)'
      )

  @property
  def backbone(self) -> VQConfig:
    """Encoder and decoder; they are the single-scale tokenizer's."""
    return VQConfig(
      codes=self.codes,
      code_dim=self.code_dim,
      l2_norm=self.l2_norm,
      ch=self.ch,
      ch_mult=tuple(self.ch_mult),
      res_blocks=self.res_blocks,
      z_channels=self.code_dim,
      groups=self.groups,
      attn=self.attn,
      patch=self.patch,
      skip=self.skip,
      local=self.local,
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
_SIZES['tiny'] = dict(
  codes=1024, code_dim=48, patch_nums=(2, 4, 8), ch=48, ch_mult=(1,),
  res_blocks=1, groups=0, attn=False, patch=4, skip=True, local=True,
)  # fmt: skip


def msvq_config(size: str, **overrides: Any) -> MSVQConfig:
  """A config by size name.

  Args:
    size: 'var256', 'var512' or 'var1024': one public checkpoint (109M
      parameters), scales for images of so many pixels; or 'tiny' (4 pixels a
      latent, 32 pixels).
    **overrides: fields that differ.

  Raises:
    ValueError: unknown size.
  """
  return MSVQConfig(**(fields_of_size(_SIZES, size) | overrides))
