"""The semantic encoder: images to the features that the prefix is made of.

In: images `[B, H, W, 3]` in [-1, 1] of any size. Out: a feature map
`[B, h, w, d]`. Resizing, normalisation and the choice of layers belong to the
encoder, so that training, sampling and scoring cannot differ in them.
Sources: method 5.2-5.3, AMAP-ML/SCAR (joint norm over four layers).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scar_jax.models.encoders import blocks
from scar_jax.models.encoders.dinov2 import DINOv2, DINOv2Config, dinov2_config
from scar_jax.models.layers import layer_norm
from scar_jax.models.resize import MODES, resize

KINDS = ('dinov2',)
# Mean and standard deviation per channel, of pixels in [0, 1].
NORMALIZE = {
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  'pm1': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  'clip': (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
  ),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """A frozen image encoder and what is read from it.

  Attributes:
    kind: network, a value of `KINDS`.
    image_size: pixels that the network sees; other images are resized.
    features: 'last' = after the final norm; 'last4' = four layers at equal
      distances, concatenated, one norm without parameters over all of them; a
      number = that layer (from 0), after the final norm.
    resize: a value of `resize.MODES`.
    normalize: 'imagenet', 'clip', or 'pm1' = pixels in [-1, 1] as they come.
    patch: pixels of a patch; this and all below as in `DINOv2Config`.
  """

  kind: str = 'dinov2'
  image_size: int = 224
  features: str = 'last'
  resize: str = 'bilinear'
  normalize: str = 'imagenet'
  patch: int = 14
  width: int = 768
  depth: int = 12
  heads: int = 12
  ffn: str = 'mlp'
  table: int = 37
  registers: int = 0
  layerscale: bool = True
  pos_interp: str = 'offset0.1'
  norm_eps: float = 1e-6
  dtype: str = 'float32'

  def __post_init__(self):
    accepted = {
      'kind': KINDS,
      'resize': MODES,
      'normalize': tuple(NORMALIZE),
      'pos_interp': blocks.POS_INTERP,
    }
    for name, values in accepted.items():
      if getattr(self, name) not in values:
        raise ValueError(
          f'encoder {name}={getattr(self, name)!r}; accepted: '
          f'{", ".join(values)} (set --config.model.{name})'
        )
    encoder_layers(self)
    encoder_grid(self)

  def network(self) -> DINOv2Config:
    """Config of the network alone."""
    names = {f.name for f in dataclasses.fields(DINOv2Config)}
    own = dataclasses.asdict(self)
    return DINOv2Config(**{k: v for k, v in own.items() if k in names})


# The embedded default, small enough to be trained on a CPU in minutes.
_TINY = dict(
  patch=4, width=128, depth=4, heads=4, table=8, layerscale=False,
  image_size=32, normalize='pm1', pos_interp='size',
)  # fmt: skip


def encoder_config(size: str, **overrides: Any) -> EncoderConfig:
  """A config by size name.

  Args:
    size: 'tiny' (4 pixels a patch) or a name of `dinov2_config`.
    **overrides: fields that differ.

  Raises:
    ValueError: unknown size.
  """
  if size == 'tiny':
    return EncoderConfig(**(_TINY | overrides))
  fields = dataclasses.asdict(dinov2_config(size))
  del fields['layerscale_init']
  return EncoderConfig(**(fields | overrides))


def encoder_layers(cfg: EncoderConfig) -> tuple[int, ...]:
  """Layers whose outputs `features` asks for; () is the last, normed.

  Raises:
    ValueError: not a kind of features, or not a layer.
  """
  if cfg.features == 'last':
    return ()
  if cfg.features == 'last4' and cfg.depth >= 4:
    return tuple(int((i + 1) * cfg.depth / 4 - 1) for i in range(4))
  if cfg.features.isdecimal() and int(cfg.features) < cfg.depth:
    return (int(cfg.features),)
  raise ValueError(
    f'encoder features={cfg.features!r} with {cfg.depth} layers; accepted: '
    f'last, last4 (4 layers or more), 0 to {cfg.depth - 1} '
    '(set --config.model.features)'
  )


def encoder_grid(cfg: EncoderConfig) -> tuple[int, int]:
  """(rows, columns) of the feature map."""
  return blocks.patch_grid((cfg.image_size, cfg.image_size), cfg.patch)


def encoder_width(cfg: EncoderConfig) -> int:
  """Channels d of the feature map."""
  return cfg.width * max(len(encoder_layers(cfg)), 1)


def prepare(
  cfg: EncoderConfig, images: Float[Array, 'B H W 3']
) -> Float[Array, 'B h w 3']:
  """Images in [-1, 1] as the network wants them: its size, its scale."""
  size = (cfg.image_size, cfg.image_size)
  images = images.astype(jnp.float32)
  if images.shape[1:3] != size:
    images = resize(images, size, cfg.resize)
  if cfg.normalize == 'pm1':
    return images
  mean, std = (np.array(x, np.float32) for x in NORMALIZE[cfg.normalize])
  return ((images + 1) / 2 - mean) / std


class SemanticEncoder(nn.Module):
  """Network plus preparation; its parameters are those of the network."""

  cfg: EncoderConfig

  def setup(self):
    self.network = DINOv2(self.cfg.network(), name='network')

  def __call__(
    self, images: Float[Array, 'B H W 3']
  ) -> Float[Array, 'B h w d']:
    """Features, float32. The caller stops the gradient."""
    cfg = self.cfg
    layers = encoder_layers(cfg)
    out = self.network(prepare(cfg, images), layers=layers)
    skip = 1 + cfg.registers
    if not layers:
      x = out.patches
    elif cfg.features == 'last4':
      x = jnp.concatenate(list(out.layers), axis=-1)[:, skip:]
      x = layer_norm(x, cfg.norm_eps)
    else:
      x = self.network.norm(out.layers[0])[:, skip:]
    x = x.astype(jnp.float32)
    return x.reshape(x.shape[0], *encoder_grid(cfg), -1)
