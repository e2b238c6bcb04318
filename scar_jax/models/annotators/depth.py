"""Depth Anything: a DINOv2 with a DPT head, pictures to inverse depth.

In: normalised images `[B, H, W, 3]`, sides divisible by the patch. Out: how
near each pixel is, `[B, H, W]`, float32, not negative, of unknown scale. Called
by `scar controls --kind=depth`. Source: `DepthAnythingForDepthEstimation` of
huggingface/transformers, `DPTHead` of DepthAnything/Depth-Anything-V2.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from scar_jax.models.encoders.dinov2 import (
  DINOv2,
  DINOv2Config,
  dinov2_config,
)
from scar_jax.models.resize import resize
from scar_jax.models.tokenizers.layers import Conv, depth_to_space
from scar_jax.sharding import annotated

_POINT = dict(window=1, padding=((0, 0), (0, 0)))
# Each feature map is brought to so many times the patch grid.
FACTORS = (4, 2, 1, 0.5)


@dataclasses.dataclass(frozen=True)
class DepthConfig:
  """Sizes; the defaults are Depth Anything V2's S.

  Attributes:
    network: the DINOv2.
    layers: blocks whose outputs are read, from 0; V1 reads the last four.
    necks: channels of each of them in the head.
    width: channels where they are fused.
    head: channels before the last map.
    image_size: pixels of the shorter side that it was trained on.
  """

  network: DINOv2Config = dinov2_config('S')
  layers: tuple[int, ...] = (2, 5, 8, 11)
  necks: tuple[int, ...] = (48, 96, 192, 384)
  width: int = 64
  head: int = 32
  image_size: int = 518

  def __post_init__(self):
    if len(self.layers) != len(FACTORS) or len(self.necks) != len(FACTORS):
      raise ValueError(
        f'layers={self.layers} and necks={self.necks}; accepted: '
        f'{len(FACTORS)} of each (set --layers)'
      )


_SIZES: dict[str, dict[str, Any]] = {
  'S': {},
  'B': dict(necks=(96, 192, 384, 768), width=128),
  'L': dict(
    layers=(4, 11, 17, 23), necks=(256, 512, 1024, 1024), width=256
  ),
}  # fmt: skip


def depth_config(size: str, **overrides: Any) -> DepthConfig:
  """A config by size name: 'S', 'B' or 'L' of Depth Anything V2.

  Raises:
    ValueError: unknown size.
  """
  if size not in _SIZES:
    raise ValueError(f'depth size {size!r}; accepted: {", ".join(_SIZES)}')
  network = dict(network=dinov2_config(size))
  return DepthConfig(**(network | _SIZES[size] | overrides))


class _Reassemble(nn.Module):
  """Patch features to a map of `factor` times their grid."""

  width: int
  factor: float

  @nn.compact
  def __call__(self, x: Float[Array, 'B h w D']) -> Float[Array, 'B H W C']:
    x = Conv(self.width, name='project', **_POINT)(x)
    if self.factor < 1:
      return Conv(self.width, stride=round(1 / self.factor), name='resize')(x)
    if self.factor == 1:
      return x
    # A transposed convolution whose stride is its size: no sums, only places.
    n, C = int(self.factor), self.width
    init = annotated(nn.initializers.lecun_normal(), None, None, None, None)
    kernel = self.param('kernel', init, (C, C, n, n))  # in, out, row, column
    bias = self.param('bias', annotated(nn.initializers.zeros, None), (C,))
    x = jnp.einsum('bhwi,ioyx->bhwyxo', x, kernel) + bias
    return depth_to_space(x.reshape(*x.shape[:3], -1), n)


class _Residual(nn.Module):
  """Two convolutions, a ReLU before each, plus the input."""

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    y = Conv(x.shape[-1], name='conv1')(nn.relu(x))
    return x + Conv(x.shape[-1], name='conv2')(nn.relu(y))


class _Fusion(nn.Module):
  """Adds a map to the coarser ones before, and enlarges the sum."""

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B h w C'],
    finer: Float[Array, 'B h w C'] | None,
    size: tuple[int, int],
  ) -> Float[Array, 'B H W C']:
    if finer is not None:
      x = x + _Residual(name='residual1')(finer)
    x = _Residual(name='residual2')(x)
    x = resize(x, size, 'bilinear_corners')
    return Conv(x.shape[-1], name='project', **_POINT)(x)


class DepthAnything(nn.Module):
  """The whole network."""

  cfg: DepthConfig

  def setup(self):
    cfg = self.cfg
    self.backbone = DINOv2(cfg.network)
    self.reassemble = [
      _Reassemble(c, f) for c, f in zip(cfg.necks, FACTORS, strict=True)
    ]
    self.necks = [Conv(cfg.width, use_bias=False) for _ in cfg.necks]
    self.fusions = [_Fusion() for _ in cfg.necks]  # coarse to fine
    self.conv1 = Conv(cfg.width // 2)
    self.conv2 = Conv(cfg.head)
    self.conv3 = Conv(1, **_POINT)

  def __call__(self, images: Float[Array, 'B H W 3']) -> Float[Array, 'B H W']:
    """Inverse depth.

    Raises:
      ValueError: a side that the patch does not divide.
    """
    cfg, size = self.cfg, images.shape[1:3]
    grid = tuple(n // cfg.network.patch for n in size)
    tokens = self.backbone(images, layers=cfg.layers).layers
    tokens = self.backbone.norm(tokens)[:, :, 1 + cfg.network.registers :]
    maps = []
    for one, reassemble, neck in zip(
      tokens, self.reassemble, self.necks, strict=True
    ):
      one = one.reshape(one.shape[0], *grid, -1).astype(jnp.float32)
      maps.append(neck(reassemble(one)))
    maps.reverse()
    x = maps[0]
    for i, fusion in enumerate(self.fusions):
      finer = maps[i] if i else None
      if i + 1 < len(maps):
        wanted = maps[i + 1].shape[1:3]
      else:
        wanted = (2 * maps[i].shape[1], 2 * maps[i].shape[2])
      x = fusion(x, finer, wanted)
    x = resize(self.conv1(x), size, 'bilinear_corners')
    x = nn.relu(self.conv3(nn.relu(self.conv2(x))))
    return x[..., 0]
