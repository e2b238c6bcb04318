"""The semantic encoder: images to the features that the prefix is made of.

In: images `[B, H, W, 3]` in [-1, 1] of any size. Out: a feature map
`[B, h, w, d]`, square unless another grid is asked for. Resizing, normalisation
and the choice of layers belong to the encoder, so that training, sampling and
scoring cannot differ in them.
Sources: method 5.2-5.4, AMAP-ML/SCAR (joint norm over four layers).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scar_jax.models.encoders import blocks
from scar_jax.models.encoders.clip import (
  CLIP_SIZES,
  CLIPVision,
  CLIPVisionConfig,
  clip_config,
)
from scar_jax.models.encoders.dinov2 import (
  DINOV2_SIZES,
  DINOv2,
  DINOv2Config,
  dinov2_config,
)
from scar_jax.models.encoders.sam import SAM, SAM_SIZES, SAMConfig, sam_config
from scar_jax.models.encoders.vit import VIT_SIZES, ViT, ViTConfig, vit_config
from scar_jax.models.layers import layer_norm
from scar_jax.models.resize import MODES, resize
from scar_jax.models.unstacked import as_read_fastest
from scar_jax.types import PyTree

Network = DINOv2Config | ViTConfig | CLIPVisionConfig | SAMConfig
_NETWORKS: dict[str, tuple[Any, type]] = {
  'dinov2': (DINOv2, DINOv2Config),
  'vit': (ViT, ViTConfig),
  'clip': (CLIPVision, CLIPVisionConfig),
  'sam': (SAM, SAMConfig),
}
KINDS = tuple(_NETWORKS)
SIZES = (
  'tiny',
  *DINOV2_SIZES,
  *(f'vit-{size}' for size in VIT_SIZES),
  *(f'clip-{size}' for size in CLIP_SIZES),
  *(f'sam-{size}' for size in SAM_SIZES),
)
# What each family was trained on; ViT stands for AugReg, not for DINO v1.
_SCALES = {
  'dinov2': 'imagenet',
  'vit': 'pm1',
  'clip': 'clip',
  'sam': 'imagenet',
}
# The norm over several layers is SCAR's, whatever the network's own norms.
_JOINT_EPS = 1e-6
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
      number = that layer (from 0), after the final norm. The final norm of
      CLIP is its post norm, that of SAM a norm without parameters.
    resize: a value of `resize.MODES`.
    normalize: 'imagenet', 'clip', or 'pm1' = pixels in [-1, 1] as they come.
    patch: pixels of a patch; this and all below as in the config of the
      network. What a network does not have stays as it is here.
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
  hidden: int = 0
  act: str = 'quick_gelu'
  window: int = 14
  global_layers: tuple[int, ...] = ()

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
    names = _names(_NETWORKS[self.kind][1]) | _PREPARATION
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name not in names and value != field.default:
        raise ValueError(
          f'encoder {field.name}={value!r} with kind={self.kind!r}, which has '
          f'no such field; accepted: {field.default!r} '
          f'(set --config.model.{field.name})'
        )
    self.network()
    encoder_layers(self)
    encoder_grid(self)

  @property
  def extra_tokens(self) -> int:
    """Class token and registers, in front of the patches."""
    return 0 if self.kind == 'sam' else 1 + self.registers

  def network(self) -> Any:
    """Config of the network alone."""
    cls = _NETWORKS[self.kind][1]
    own = {k: v for k, v in vars(self).items() if k in _names(cls)}
    # SAM's neck belongs to its decoder.
    return cls(**own, **({'neck': 0} if self.kind == 'sam' else {}))


_PREPARATION = {'kind', 'image_size', 'features', 'resize', 'normalize'}


def _names(cls: type) -> set[str]:
  return {f.name for f in dataclasses.fields(cls)}


# The embedded default, small enough to be trained on a CPU in minutes.
_TINY = dict(
  patch=4, width=128, depth=3, heads=2, table=8, layerscale=False,
  image_size=32, normalize='pm1', pos_interp='size',
)  # fmt: skip


def encoder_config(size: str, **overrides: Any) -> EncoderConfig:
  """A config by size name.

  Args:
    size: a value of `SIZES`: 'tiny' (4 pixels a patch), a DINOv2 size, or
      another kind with its size, as 'clip-B/16'.
    **overrides: fields that differ.

  Raises:
    ValueError: unknown size.
  """
  if size not in SIZES:
    raise ValueError(
      f'encoder size {size!r}; accepted: {", ".join(SIZES)} '
      '(set --config.model.size)'
    )
  if size == 'tiny':
    return EncoderConfig(**(_TINY | overrides))
  kind, _, name = size.rpartition('-')
  if kind == 'vit':
    return encoder_around(vit_config(name), **overrides)
  if kind == 'clip':
    return encoder_around(clip_config(name).vision, **overrides)
  if kind == 'sam':
    return encoder_around(sam_config(name), **overrides)
  return encoder_around(dinov2_config(name), **overrides)


def encoder_around(
  network: Network, image_size: int | None = None, **overrides: Any
) -> EncoderConfig:
  """The encoder whose network has this config, as a checkpoint gives it.

  Args:
    network: config of the network.
    image_size: pixels that it sees; 16 patches by default.
    **overrides: fields that differ.
  """
  kind = next(k for k, (_, cls) in _NETWORKS.items() if cls is type(network))
  names = _names(EncoderConfig)
  fields = {k: v for k, v in vars(network).items() if k in names}
  fields |= dict(
    kind=kind,
    image_size=image_size or 16 * network.patch,
    normalize=_SCALES[kind],
  )
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
  cfg: EncoderConfig,
  images: Float[Array, 'B H W 3'],
  grid: tuple[int, int] | None = None,
) -> Float[Array, 'B h w 3']:
  """Images in [-1, 1] as the network wants them: its size, its scale.

  Args:
    cfg: of the encoder.
    images: of any size.
    grid: (rows, columns) of patches; None is `encoder_grid`.
  """
  rows, columns = grid or encoder_grid(cfg)
  size = (rows * cfg.patch, columns * cfg.patch)
  images = images.astype(jnp.float32)
  if images.shape[1:3] != size:
    images = resize(images, size, cfg.resize)
  if cfg.normalize == 'pm1':
    return images
  mean, std = (np.array(x, np.float32) for x in NORMALIZE[cfg.normalize])
  return ((images + 1) / 2 - mean) / std


def encoder_params(params: PyTree) -> PyTree:
  """Parameters of a `SemanticEncoder` from a file, as they are read fastest."""
  return {**params, 'network': as_read_fastest(params['network'], turn=True)}


class SemanticEncoder(nn.Module):
  """Network plus preparation; its parameters are those of the network."""

  cfg: EncoderConfig

  def setup(self):
    module = _NETWORKS[self.cfg.kind][0]
    self.network = module(self.cfg.network(), name='network')

  def __call__(
    self,
    images: Float[Array, 'B H W 3'],
    grid: tuple[int, int] | None = None,
  ) -> Float[Array, 'B h w d']:
    """Features, float32. The caller stops the gradient.

    Args:
      images: see `prepare`.
      grid: (rows, columns) of the features; None is `encoder_grid`.
    """
    cfg = self.cfg
    layers, grid = encoder_layers(cfg), grid or encoder_grid(cfg)
    out = self.network(prepare(cfg, images, grid), layers=layers)
    skip = cfg.extra_tokens
    if not layers:
      x = out.patches
    elif cfg.features == 'last4':
      x = jnp.concatenate(list(out.layers), axis=-1)[:, skip:]
      x = layer_norm(x, _JOINT_EPS)
    else:
      x = self.network.norm(out.layers[0])[:, skip:]
    x = x.astype(jnp.float32)
    return x.reshape(x.shape[0], *grid, -1)
