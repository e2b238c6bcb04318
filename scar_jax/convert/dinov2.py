"""Names of public DINOv2 checkpoints and where each tensor goes.

In: a torch state dict as numpy arrays, in the names of facebookresearch/dinov2
(also its chunked training names) or of huggingface/transformers (also with the
prefix `dinov2.`). Out: the `params` of `DINOv2`. Method 11.6 is the table.
"""

import math
import re
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
from scar_jax.convert.sizes import count, heads_of_64, shape_of
from scar_jax.models.encoders.dinov2 import (
  DINOV2_SIZES,
  DINOv2,
  DINOv2Config,
  dinov2_config,
)
from scar_jax.models.encoders.semantic import EncoderConfig

_PREFIX = 'dinov2.'
SKIP = (r'(embeddings\.)?mask_token', r'(classifier|head)\..*')


def table(cfg: DINOv2Config, hugging_face: bool) -> list[Entry]:
  """Every tensor of the checkpoint, in one of the two namings."""
  if hugging_face:
    embed, patch = 'embeddings.', 'embeddings.patch_embeddings.projection'
    positions, norm = 'embeddings.position_embeddings', 'layernorm'
    layer = 'encoder.layer.{i}'
    heads = f'{layer}.attention.attention'
    qkv = [f'{heads}.{n}' for n in ('query', 'key', 'value')]
    out = f'{layer}.attention.output.dense'
    scale = [f'{layer}.layer_scale{n}.lambda1' for n in '12']
    ffn = {'w12': 'weights_in', 'w3': 'weights_out'}
  else:
    embed, patch, positions, norm = '', 'patch_embed.proj', 'pos_embed', 'norm'
    layer = 'blocks.{i}'
    qkv, out = [f'{layer}.attn.qkv'], f'{layer}.attn.proj'
    scale = [f'{layer}.ls{n}.gamma' for n in '12']
    ffn = {}
  entries = [
    Entry('cls_token', (f'{embed}cls_token',), lead=2),
    Entry('pos_embed', (positions,), lead=1),
    *conv('patch_embed/proj', patch),
    *affine('norm', norm),
    *affine('layers/norm1', f'{layer}.norm1'),
    *affine('layers/norm2', f'{layer}.norm2'),
    *linear('layers/attn/qkv', *qkv),
    *linear('layers/attn/out', out, in_dims=2),
  ]
  for name in ('w12', 'w3') if cfg.ffn == 'swiglu' else ('fc1', 'fc2'):
    source = f'{layer}.mlp.{ffn.get(name, name)}'
    entries += linear(f'layers/mlp/{name}', source)
  if cfg.layerscale:
    entries += [
      Entry(f'layers/ls{n}', (source,))
      for n, source in zip('12', scale, strict=True)
    ]
  if cfg.registers:
    entries.append(Entry('registers', (f'{embed}register_tokens',), lead=1))
  return entries


def plain_names(state: Mapping[str, Any]) -> Renamed:
  """Without the prefix of whole models and the chunk index of training.

  Of a model that has a DINOv2 among other parts, only that.

  Raises:
    ValueError: two tensors would get one name.
  """
  inside = any(name.startswith(_PREFIX) for name in state)

  def rename(name: str) -> str | None:
    if inside and not name.startswith((_PREFIX, 'classifier.', 'head.')):
      return None
    short = name.removeprefix(_PREFIX)
    return re.sub(r'^blocks\.\d+\.(\d+)\.', r'blocks.\1.', short)

  return Renamed(state, rename)


def convert(
  cfg: DINOv2Config | EncoderConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `DINOv2(cfg)`, for an `EncoderConfig` of its network.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  network: Any = cfg.network() if isinstance(cfg, EncoderConfig) else cfg
  state = plain_names(state)
  side = network.patch
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  abstract = jax.eval_shape(DINOv2(network).init, jax.random.key(0), image)
  hugging_face = any(name.startswith('embeddings.') for name in state)
  entries = table(network, hugging_face)
  return assemble(entries, state, abstract['params'], SKIP)


def detect(
  state: Mapping[str, Any],
  heads: int | None = None,
  image_size: int = 224,
  features: str = 'last',
) -> EncoderConfig:
  """The encoder that a checkpoint holds, from shapes alone.

  Args:
    state: torch tensors or their shapes.
    heads: 64 channels each by default, as in all public sizes.
    image_size: pixels that the network is to see; a checkpoint fits any.
    features: what it is to give, see `EncoderConfig`.

  Raises:
    ValueError: tensors that the sizes are read from are missing, or the width
      is not a multiple of 64 and `heads` is not given.
  """
  shapes = getattr(state, 'shapes', state)
  official = 'dino_mlp.weight' in shapes
  wide = shapes['downsample_conv.weight'].shape[0] if official else 0
  shapes = plain_names(shapes)
  hugging_face = any(name.startswith('embeddings.') for name in shapes)
  embed = 'embeddings.' if hugging_face else ''
  names = ('position_embeddings', 'patch_embeddings.projection.weight')
  plain = ('pos_embed', 'patch_embed.proj.weight')
  table, patch = names if hugging_face else plain
  layer = 'encoder.layer.{}.norm1.weight'
  depth = count(layer if hugging_face else 'blocks.{}.norm1.weight', shapes)
  _, rows, width = shape_of(shapes, f'{embed}{table}')
  registers = f'{embed}register_tokens'
  tail = 'layer_scale1.lambda1' if hugging_face else 'ls1.gamma'
  reg = shape_of(shapes, registers)[1] if registers in shapes else 0
  fields: dict[str, Any] = {'features': features}
  if official:  # the SCAR release reads its encoder in its own way
    fields['normalize'] = 'pm1'
    fields['features'] = 'last4' if wide == 4 * width else 'last'
  return EncoderConfig(
    image_size=image_size,
    patch=shape_of(shapes, f'{embed}{patch}')[-1],
    width=width,
    depth=depth,
    heads=heads or heads_of_64(width),
    ffn='swiglu'
    if any(re.search(r'mlp\.(w12|weights_in)\.', n) for n in shapes)
    else 'mlp',
    table=math.isqrt(rows - 1),
    registers=reg,
    layerscale=any(n.endswith(tail) for n in shapes),
    pos_interp='size_aa' if reg else 'offset0.1',
    **fields,
  )


artifact = encoder_artifact


def size(cfg: EncoderConfig) -> str:
  """Name of the size, or 'custom'."""
  for name in DINOV2_SIZES:
    if dinov2_config(name) == cfg.network():
      return name
  return 'custom'
