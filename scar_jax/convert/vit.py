"""Names of public ViT and DINO v1 checkpoints and where each tensor goes.

In: a torch state dict as numpy arrays, in the names of
huggingface/transformers `ViTModel` (also with the prefix `vit.`) or of timm
and facebookresearch/dino. Out: the `params` of `ViT`. Method 11.8 is the table.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert.common import (
  Entry,
  affine,
  assemble,
  conv,
  encoder_artifact,
  linear,
)
from scar_jax.convert.readers import Renamed
from scar_jax.convert.sizes import layers_of, public_heads, shape_of
from scar_jax.models.encoders.semantic import EncoderConfig, encoder_around
from scar_jax.models.encoders.vit import VIT_SIZES, ViT, ViTConfig, vit_config

SKIP = (
  r'(embeddings\.)?mask_token',
  r'(classifier|head|pre_logits)\..*',
)
POOLER = r'pooler\..*'


def table(cfg: ViTConfig, hugging_face: bool = True) -> list[Entry]:
  """Every tensor of the checkpoint, in one of the two namings."""
  if hugging_face:
    embed, patch = 'embeddings.', 'embeddings.patch_embeddings.projection'
    positions, norm = 'embeddings.position_embeddings', 'layernorm'
    layer = 'encoder.layer.{i}'
    norms = 'layernorm_before', 'layernorm_after'
    heads = f'{layer}.attention.attention'
    qkv = [f'{heads}.{n}' for n in ('query', 'key', 'value')]
    out = 'attention.output.dense'
    ffn = 'intermediate.dense', 'output.dense'
  else:
    embed, patch, positions, norm = '', 'patch_embed.proj', 'pos_embed', 'norm'
    layer = 'blocks.{i}'
    norms = 'norm1', 'norm2'
    qkv, out = [f'{layer}.attn.qkv'], 'attn.proj'
    ffn = 'mlp.fc1', 'mlp.fc2'
  entries = [
    Entry('cls_token', (f'{embed}cls_token',), lead=2),
    Entry('pos_embed', (positions,), lead=1),
    *conv('patch_embed/proj', patch),
    *affine('norm', norm),
    *affine('layers/norm1', f'{layer}.{norms[0]}'),
    *affine('layers/norm2', f'{layer}.{norms[1]}'),
    *linear('layers/attn/qkv', *qkv),
    *linear('layers/attn/out', f'{layer}.{out}', in_dims=2),
    *linear('layers/mlp/fc1', f'{layer}.{ffn[0]}'),
    *linear('layers/mlp/fc2', f'{layer}.{ffn[1]}'),
  ]
  if cfg.pooler:
    entries += linear('pooler', 'pooler.dense')
  return entries


def plain_names(state: Mapping[str, Any]) -> Renamed:
  """Without the prefix of whole models.

  Raises:
    ValueError: two tensors would get one name.
  """
  return Renamed(state, lambda name: name.removeprefix('vit.'))


def _is_hugging_face(names: Mapping[str, Any]) -> bool:
  return any(name.startswith('embeddings.') for name in names)


def convert(
  cfg: ViTConfig | EncoderConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `ViT(cfg)`, for an `EncoderConfig` of its network.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  net = cfg.network() if isinstance(cfg, EncoderConfig) else cfg
  state = plain_names(state)
  image = jax.ShapeDtypeStruct((1, net.patch, net.patch, 3), jnp.float32)
  method = 'pool' if net.pooler else '__call__'

  def init(key: Any, image: Any) -> Any:
    return ViT(net).init(key, image, method=method)

  abstract = jax.eval_shape(init, jax.random.key(0), image)
  entries = table(net, _is_hugging_face(state))
  skip = SKIP if net.pooler else (*SKIP, POOLER)
  return assemble(entries, state, abstract['params'], skip)


def detect_network(
  state: Mapping[str, Any], heads: int | None = None
) -> ViTConfig:
  """The network that a checkpoint holds, from shapes alone; see `detect`."""
  shapes = plain_names(getattr(state, 'shapes', state)).shapes
  if _is_hugging_face(shapes):
    patch = 'embeddings.patch_embeddings.projection.weight'
    positions, layers = 'embeddings.position_embeddings', 'encoder.layer.'
  else:
    patch, positions = 'patch_embed.proj.weight', 'pos_embed'
    layers = 'blocks.'
  _, rows, width = shape_of(shapes, positions)
  return ViTConfig(
    patch=shape_of(shapes, patch)[-1],
    width=width,
    depth=layers_of(layers, shapes),
    heads=public_heads(width, heads),
    table=math.isqrt(rows - 1),
  )


def detect(
  state: Mapping[str, Any],
  heads: int | None = None,
  image_size: int | None = None,
  normalize: str = 'pm1',
) -> EncoderConfig:
  """The encoder that a checkpoint holds, from shapes alone.

  Args:
    state: torch tensors or their shapes.
    heads: 64 channels each by default, as in all named sizes.
    image_size: pixels that the network is to see; 16 patches by default.
    normalize: no tensor tells AugReg from DINO v1, which needs 'imagenet'.

  Raises:
    ValueError: tensors that the sizes are read from are missing, or the width
      is not a multiple of 64 and `heads` is not given.
  """
  network = detect_network(state, heads)
  return encoder_around(network, image_size=image_size, normalize=normalize)


artifact = encoder_artifact


def size(cfg: EncoderConfig) -> str:
  """Name of the size, whatever the side of its positions; or 'custom'."""
  for name in VIT_SIZES:
    named = vit_config(name)
    if dataclasses.replace(cfg.network(), table=named.table) == named:
      return name
  return 'custom'
