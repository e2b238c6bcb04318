"""Names of public DINOv2 checkpoints and where each tensor goes.

In: a torch state dict as numpy arrays, in the names of facebookresearch/dinov2
(also its chunked training names) or of huggingface/transformers (also with the
prefix `dinov2.`). Out: the `params` of `DINOv2`. Method 11.6 is the table.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert.common import Entry, affine, assemble, conv, linear
from scar_jax.models.encoders.dinov2 import DINOv2, DINOv2Config

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


def plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
  """Without the prefix of whole models and the chunk index of training."""
  names = {}
  for name, value in state.items():
    short = name.removeprefix('dinov2.')
    short = re.sub(r'^blocks\.\d+\.(\d+)\.', r'blocks.\1.', short)
    names[short] = value
  return names


def convert(
  cfg: DINOv2Config, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `DINOv2(cfg)`.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  state = plain_names(state)
  side = cfg.patch
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  abstract = jax.eval_shape(DINOv2(cfg).init, jax.random.key(0), image)
  hugging_face = any(name.startswith('embeddings.') for name in state)
  entries = table(cfg, hugging_face)
  return assemble(entries, state, abstract['params'], SKIP)
