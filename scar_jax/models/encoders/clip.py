"""CLIP: the image tower, the text tower, and the space that they share.

In: normalised images `[B, H, W, 3]`; token ids `[B, T]` that begin with BOS
and hold the end token, the largest id. Out: tokens of each tower, embeddings
of unit length, logits of pairs. The image tower alone is a semantic encoder.
Source: huggingface/transformers `CLIPModel`, method 5.4.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models.encoders import blocks
from scar_jax.models.encoders.dinov2 import ViTOutput
from scar_jax.sharding import annotated, constrain

# OpenAI's weights need the first, some later ones (LAION's) the second.
ACTS = {'quick_gelu': blocks.quick_gelu, 'gelu': blocks.gelu_exact}


def _check_tower(cfg: Any) -> None:
  if cfg.width % cfg.heads:
    raise ValueError(
      f'CLIP width={cfg.width} is not divisible by heads={cfg.heads}; '
      'accepted: a divisor (set --config.model.heads)'
    )
  if cfg.act not in ACTS:
    raise ValueError(
      f'CLIP act={cfg.act!r}; accepted: {", ".join(ACTS)} '
      '(set --config.model.act)'
    )


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """Sizes of the image tower; the defaults are B/16."""

  patch: int = 16  # pixels
  width: int = 768  # features D
  depth: int = 12  # layers
  heads: int = 12
  hidden: int = 0  # width of the feed-forward; 0: 4 D
  table: int = 14  # side of the position table: 224 pixels
  act: str = 'quick_gelu'  # a name in ACTS
  pos_interp: str = 'size'  # see blocks.fit_positions
  norm_eps: float = 1e-5
  dtype: str = 'float32'  # of matrix products

  def __post_init__(self):
    _check_tower(self)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Sizes of the text tower; the defaults are those of B/16 and B/32."""

  vocab: int = 49408
  length: int = 77  # positions
  width: int = 512  # features D
  depth: int = 12  # layers
  heads: int = 8
  hidden: int = 0  # width of the feed-forward; 0: 4 D
  act: str = 'quick_gelu'  # a name in ACTS
  norm_eps: float = 1e-5
  dtype: str = 'float32'  # of matrix products

  def __post_init__(self):
    _check_tower(self)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Both towers."""

  vision: CLIPVisionConfig = CLIPVisionConfig()
  text: CLIPTextConfig = CLIPTextConfig()
  joint: int = 512  # width of the shared space


_LARGE = dict(patch=14, width=1024, depth=24, heads=16)
_SIZES: dict[str, dict[str, Any]] = {
  'B/32': dict(patch=32, table=7),
  'B/16': {},
  'L/14': _LARGE | dict(table=16),
  'L/14@336': _LARGE | dict(table=24),
}
CLIP_SIZES = tuple(_SIZES)


def clip_config(size: str) -> CLIPConfig:
  """A config by size name, a value of `CLIP_SIZES`.

  Raises:
    ValueError: unknown size.
  """
  if size not in _SIZES:
    raise ValueError(f'CLIP size {size!r}; accepted: {", ".join(_SIZES)}')
  vision = CLIPVisionConfig(**_SIZES[size])
  if size.startswith('L'):
    return CLIPConfig(vision, CLIPTextConfig(width=768, heads=12), 768)
  return CLIPConfig(vision)


def _make_layers(
  owner: nn.Module, cfg: CLIPVisionConfig | CLIPTextConfig
) -> Any:
  return blocks.make_layers(
    owner,
    cfg.depth,
    heads=cfg.heads,
    hidden=cfg.hidden or 4 * cfg.width,
    act=ACTS[cfg.act],
    norm_eps=cfg.norm_eps,
    dtype=cfg.dtype,
  )


class CLIPVision(nn.Module):
  """Vision transformer with a norm before its layers."""

  cfg: CLIPVisionConfig

  def setup(self):
    cfg = self.cfg
    D = cfg.width
    self.patch_embed = blocks.PatchEmbed(
      cfg.patch, D, bias=False, dtype=cfg.dtype, name='patch_embed'
    )
    self.cls_token = self.param('cls_token', annotated(blocks.INIT, None), (D,))
    self.pos_embed = self.param(
      'pos_embed', annotated(blocks.INIT, None, None), (1 + cfg.table**2, D)
    )
    self.pre_norm = blocks.LayerNorm(cfg.norm_eps, name='pre_norm')
    self.layers = _make_layers(self, cfg)
    self.norm = blocks.LayerNorm(cfg.norm_eps, name='norm')

  def __call__(
    self, images: Float[Array, 'B H W 3'], layers: tuple[int, ...] = ()
  ) -> ViTOutput:
    """Runs all layers.

    Args:
      images: normalised.
      layers: indices, from 0, of the layers whose raw outputs are wanted.

    Raises:
      ValueError: a side that the patch does not divide; an unknown layer.
    """
    cfg = self.cfg
    grid = blocks.patch_grid(images.shape[1:3], cfg.patch)
    B, D = images.shape[0], cfg.width
    x = self.patch_embed(images).reshape(B, -1, D)
    cls = jnp.broadcast_to(self.cls_token, (B, 1, D))
    positions = blocks.token_positions(
      self.pos_embed, cfg.table, grid, cfg.pos_interp
    )
    x = self.pre_norm(jnp.concatenate([cls, x], axis=1) + positions)
    x = constrain(x.astype(cfg.dtype), 'batch', None, 'act_embed')
    x, kept = blocks.run_layers(self.layers, x, cfg.depth, layers)
    normed = self.norm(x)
    return ViTOutput(
      cls=normed[:, 0],
      registers=normed[:, :0],
      patches=normed[:, 1:],
      prenorm=x,
      layers=kept,
    )


class CLIPText(nn.Module):
  """Causal transformer over token ids."""

  cfg: CLIPTextConfig

  def setup(self):
    cfg = self.cfg
    self.token_embed = self.param(
      'token_embed',
      annotated(blocks.INIT, 'vocab', 'embed'),
      (cfg.vocab, cfg.width),
    )
    self.pos_embed = self.param(
      'pos_embed', annotated(blocks.INIT, None, None), (cfg.length, cfg.width)
    )
    self.layers = _make_layers(self, cfg)
    self.norm = blocks.LayerNorm(cfg.norm_eps, name='norm')

  def __call__(
    self, ids: Int[Array, 'B T'], mask: Bool[Array, 'B T'] | None = None
  ) -> tuple[Float[Array, 'B T D'], Float[Array, 'B D']]:
    """Features of every position, and those of the first end token.

    Args:
      ids: token ids; ids outside the vocabulary are the caller's mistake.
      mask: True at real tokens. It changes only features of padding behind
        the end token, which no score reads.

    Raises:
      ValueError: more ids than positions.
    """
    cfg = self.cfg
    T = ids.shape[1]
    if cfg.length < T:
      raise ValueError(
        f'{T} CLIP text ids a row; accepted: 1 to {cfg.length} (cut the text)'
      )
    x = jnp.asarray(self.token_embed)[ids] + self.pos_embed[:T]
    seen = jnp.asarray(np.tri(T, dtype=bool))[None]
    if mask is not None:
      seen = seen & mask[:, None]
    x = constrain(x.astype(cfg.dtype), 'batch', None, 'act_embed')
    x, _ = blocks.run_layers(self.layers, x, cfg.depth, mask=seen)
    x = self.norm(x)
    # The end token has the largest id, and argmax finds the first of them.
    end = jnp.argmax(ids, axis=1)
    return x, x[jnp.arange(x.shape[0]), end]


class CLIP(nn.Module):
  """Both towers, projected into one space."""

  cfg: CLIPConfig

  def setup(self):
    cfg = self.cfg
    self.vision = CLIPVision(cfg.vision, name='vision')
    self.text = CLIPText(cfg.text, name='text')
    self.image_proj, self.text_proj = (
      blocks.linear(
        (cfg.joint,), ('embed', None), use_bias=False, name=f'{name}_proj'
      )
      for name in ('image', 'text')
    )
    start = nn.initializers.constant(np.log(1 / 0.07))
    self.logit_scale = self.param('logit_scale', annotated(start), ())

  def embed_images(
    self, images: Float[Array, 'B H W 3']
  ) -> Float[Array, 'B J']:
    """Embeddings of normalised images, of unit length."""
    return _unit(self.image_proj(self.vision(images).cls))

  def embed_text(self, ids: Int[Array, 'B T']) -> Float[Array, 'B J']:
    """Embeddings of token ids, of unit length."""
    return _unit(self.text_proj(self.text(ids)[1]))

  def __call__(
    self, images: Float[Array, 'B H W 3'], ids: Int[Array, 'N T']
  ) -> Float[Array, 'B N']:
    """Logits of every image with every text."""
    cosines = self.embed_images(images) @ self.embed_text(ids).T
    return jnp.exp(self.logit_scale) * cosines


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def clip_score(
  a: Float[Array, 'B J'], b: Float[Array, 'B J']
) -> Float[Array, ' B']:
  """`100 max(cos, 0)` of matching rows of unit length."""
  return 100 * jnp.maximum(jnp.sum(a * b, axis=-1), 0)
