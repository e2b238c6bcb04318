"""Names of public SAM image encoders and where each tensor goes.

In: a torch state dict as numpy arrays, of a whole SAM or its image encoder, in
the names of facebookresearch/segment-anything or huggingface/transformers.
Out: the `params` of `SAM`. Method 11.8 is the table.
"""

import dataclasses
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
from scar_jax.convert.sizes import layers_of, shape_of
from scar_jax.models.encoders.sam import SAM, SAM_SIZES, SAMConfig, sam_config
from scar_jax.models.encoders.semantic import EncoderConfig, encoder_around

SKIP = (
  r'(prompt_encoder|mask_decoder)\..*',
  r'shared_image_embedding\..*',
  r'pixel_(mean|std)',
)
NECK = r'neck\..*'


def table(cfg: SAMConfig, hugging_face: bool = True) -> list[Entry]:
  """Every tensor of the image encoder, in one of the two namings."""
  if hugging_face:
    patch, stack, norm = 'patch_embed.projection', 'layers', 'layer_norm'
    neck = ['conv1', 'layer_norm1', 'conv2', 'layer_norm2']
  else:
    patch, stack, norm = 'patch_embed.proj', 'blocks', 'norm'
    neck = ['0', '1', '2', '3']
  entries = [
    Entry('pos_embed', ('pos_embed',), lead=1),
    *conv('patch_embed/proj', patch),
  ]
  for i in range(cfg.depth):
    ours, layer = f'layers_{i}', f'{stack}.{i}'
    entries += [
      *affine(f'{ours}/norm1', f'{layer}.{norm}1'),
      *affine(f'{ours}/norm2', f'{layer}.{norm}2'),
      *linear(f'{ours}/attn/qkv', f'{layer}.attn.qkv'),
      *linear(f'{ours}/attn/out', f'{layer}.attn.proj', in_dims=2),
      Entry(f'{ours}/attn/rel_h', (f'{layer}.attn.rel_pos_h',)),
      Entry(f'{ours}/attn/rel_w', (f'{layer}.attn.rel_pos_w',)),
      *linear(f'{ours}/mlp/fc1', f'{layer}.mlp.lin1'),
      *linear(f'{ours}/mlp/fc2', f'{layer}.mlp.lin2'),
    ]
  if cfg.neck:
    entries += [
      *conv('neck_conv1', f'neck.{neck[0]}', bias=False),
      *affine('neck_norm1', f'neck.{neck[1]}'),
      *conv('neck_conv2', f'neck.{neck[2]}', bias=False),
      *affine('neck_norm2', f'neck.{neck[3]}'),
    ]
  return entries


def plain_names(state: Mapping[str, Any]) -> Renamed:
  """Without the prefix of the encoder in a whole model.

  Raises:
    ValueError: two tensors would get one name.
  """

  def rename(name: str) -> str:
    return name.removeprefix('image_encoder.').removeprefix('vision_encoder.')

  return Renamed(state, rename)


def _is_hugging_face(names: Mapping[str, Any]) -> bool:
  return 'patch_embed.projection.weight' in names


def convert(
  cfg: SAMConfig | EncoderConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `SAM(cfg)`, for an `EncoderConfig` of its network.

  The neck is left out where the config has none.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  net = cfg.network() if isinstance(cfg, EncoderConfig) else cfg
  state = plain_names(state)
  image = jax.ShapeDtypeStruct((1, net.patch, net.patch, 3), jnp.float32)
  abstract = jax.eval_shape(SAM(net).init, jax.random.key(0), image)
  entries = table(net, _is_hugging_face(state))
  skip = SKIP if net.neck else (*SKIP, NECK)
  return assemble(entries, state, abstract['params'], skip)


def detect_network(state: Mapping[str, Any]) -> SAMConfig:
  """The network that a checkpoint holds, its neck included; see `detect`."""
  shapes = plain_names(getattr(state, 'shapes', state)).shapes
  hugging_face = _is_hugging_face(shapes)
  stack = 'layers' if hugging_face else 'blocks'
  patch = 'projection' if hugging_face else 'proj'
  neck = 'neck.conv1.weight' if hugging_face else 'neck.0.weight'
  _, side, _, width = shape_of(shapes, 'pos_embed')
  depth = layers_of(f'{stack}.', shapes)
  tables = [
    shape_of(shapes, f'{stack}.{i}.attn.rel_pos_h') for i in range(depth or 1)
  ]
  # Tables of whole-image layers span the position table, others the window.
  wide = tuple(i for i, (rows, _) in enumerate(tables) if rows == 2 * side - 1)
  narrow = [rows for i, (rows, _) in enumerate(tables) if i not in wide]
  hidden = shape_of(shapes, f'{stack}.0.mlp.lin1.weight')[0]
  return SAMConfig(
    patch=shape_of(shapes, f'patch_embed.{patch}.weight')[-1],
    width=width,
    depth=depth,
    heads=width // tables[0][1],
    hidden=0 if hidden == 4 * width else hidden,
    table=side,
    window=(narrow[0] + 1) // 2 if narrow else side,
    global_layers=wide,
    neck=shape_of(shapes, neck)[0] if neck in shapes else 0,
  )


def detect(
  state: Mapping[str, Any], image_size: int | None = None
) -> EncoderConfig:
  """The encoder that a checkpoint holds, from shapes alone.

  Args:
    state: torch tensors or their shapes.
    image_size: pixels that the network is to see; 16 patches by default.

  Raises:
    ValueError: tensors that the sizes are read from are missing.
  """
  return encoder_around(detect_network(state), image_size=image_size)


artifact = encoder_artifact


def size(cfg: EncoderConfig) -> str:
  """Name of the size, or 'custom'."""
  for name in SAM_SIZES:
    named = sam_config(name)
    if dataclasses.replace(cfg.network(), neck=named.neck) == named:
      return name
  return 'custom'
