"""Names of Depth Anything checkpoints, V1 and V2, and where each tensor goes.

In: a torch state dict as numpy arrays, in the names of huggingface/transformers
(`DepthAnythingForDepthEstimation`) or of DepthAnything/Depth-Anything-V2. Out:
the `params` of `DepthAnything`. The backbone's names are those of dinov2.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert import dinov2
from scar_jax.convert.common import Entry, assemble, conv
from scar_jax.convert.sizes import count, heads_of_64, shape_of
from scar_jax.models.annotators.depth import (
  FACTORS,
  DepthAnything,
  DepthConfig,
  depth_config,
)
from scar_jax.models.encoders.dinov2 import DINOv2Config

_HF, _META = 'backbone.', 'pretrained.'
# The coarsest map has nothing to be added to: this unit is never used.
_UNUSED = (
  r'neck\.fusion_stage\.layers\.0\.residual_layer1\..*',
  r'depth_head\.scratch\.refinenet4\.resConfUnit1\..*',
)
SKIP = (r'(backbone\.embeddings|pretrained)\.mask_token', *_UNUSED)


def _hugging_face(names: Any) -> bool:
  return any(name.startswith(_HF) for name in names)


def table(cfg: DepthConfig, hugging_face: bool) -> list[Entry]:
  """Every tensor of the checkpoint, in one of the two namings."""
  prefix = _HF if hugging_face else _META
  entries = [
    dataclasses.replace(
      entry,
      path=f'backbone/{entry.path}',
      sources=tuple(prefix + name for name in entry.sources),
    )
    for entry in dinov2.table(cfg.network, hugging_face)
  ]
  head = 'depth_head.scratch'
  for i, factor in enumerate(FACTORS):
    if hugging_face:
      stage = f'neck.reassemble_stage.layers.{i}'
      names = (f'{stage}.projection', f'{stage}.resize', f'neck.convs.{i}')
      fusion = f'neck.fusion_stage.layers.{i}'
      unit, convs, project = 'residual_layer', 'convolution', 'projection'
    else:
      stage = 'depth_head'
      names = (
        f'{stage}.projects.{i}',
        f'{stage}.resize_layers.{i}',
        f'{head}.layer{i + 1}_rn',
      )
      fusion = f'{head}.refinenet{len(FACTORS) - i}'
      unit, convs, project = 'resConfUnit', 'conv', 'out_conv'
    entries += conv(f'reassemble_{i}/project', names[0])
    if factor > 1:
      entries += [
        Entry(f'reassemble_{i}/kernel', (f'{names[1]}.weight',)),
        Entry(f'reassemble_{i}/bias', (f'{names[1]}.bias',)),
      ]
    elif factor < 1:
      entries += conv(f'reassemble_{i}/resize', names[1])
    entries += conv(f'necks_{i}', names[2], bias=False)
    for n in (1, 2) if i else (2,):
      for k in (1, 2):
        source = f'{fusion}.{unit}{n}.{convs}{k}'
        entries += conv(f'fusions_{i}/residual{n}/conv{k}', source)
    entries += conv(f'fusions_{i}/project', f'{fusion}.{project}')
  last = [f'head.conv{n}' for n in (1, 2, 3)]
  if not hugging_face:
    last = [f'{head}.output_conv{n}' for n in ('1', '2.0', '2.2')]
  for n, source in enumerate(last):
    entries += conv(f'conv{n + 1}', source)
  return entries


def convert(
  cfg: DepthConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `DepthAnything(cfg)`.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  side = 2 * cfg.network.patch
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  abstract = jax.eval_shape(DepthAnything(cfg).init, jax.random.key(0), image)
  entries = table(cfg, _hugging_face(state))
  return assemble(entries, state, abstract['params'], SKIP)


def detect(
  state: Mapping[str, Any],
  heads: int | None = None,
  image_size: int = 518,
  layers: Sequence[int] | None = None,
) -> DepthConfig:
  """The network that a checkpoint holds, from shapes alone.

  Args:
    state: torch tensors or their shapes.
    heads: 64 channels each by default, as in all public sizes.
    image_size: pixels of the shorter side that the network is to see.
    layers: blocks that are read, from 0; V2's by default, which no tensor tells
      from V1's, the last four.

  Raises:
    ValueError: tensors that the sizes are read from are missing.
  """
  shapes = getattr(state, 'shapes', state)
  hugging_face = _hugging_face(shapes)
  if hugging_face:
    stem, embed, layer = _HF, f'{_HF}embeddings.', 'encoder.layer.{}'
    position, patches = 'position_embeddings', 'patch_embeddings.projection'
    neck, first = 'neck.reassemble_stage.layers.{}.projection', 'neck.convs.0'
    conv2 = 'head.conv2'
  else:
    stem, embed, layer = _META, _META, 'blocks.{}'
    position, patches = 'pos_embed', 'patch_embed.proj'
    neck, first = 'depth_head.projects.{}', 'depth_head.scratch.layer1_rn'
    conv2 = 'depth_head.scratch.output_conv2.0'
  _, rows, width = shape_of(shapes, f'{embed}{position}')
  depth = count(f'{stem}{layer}.norm1.weight', shapes)
  known = {cfg.network.depth: cfg.layers for cfg in _published()}
  blocks = tuple(layers or known.get(depth) or range(depth - 4, depth))
  return DepthConfig(
    network=DINOv2Config(
      patch=shape_of(shapes, f'{embed}{patches}.weight')[-1],
      width=width,
      depth=depth,
      heads=heads or heads_of_64(width),
      table=math.isqrt(rows - 1),
    ),
    layers=blocks,
    necks=tuple(
      shape_of(shapes, f'{neck.format(i)}.weight')[0]
      for i in range(len(FACTORS))
    ),
    width=shape_of(shapes, f'{first}.weight')[0],
    head=shape_of(shapes, f'{conv2}.weight')[0],
    image_size=image_size,
  )


def _published() -> list[DepthConfig]:
  return [depth_config(name) for name in 'SBL']


def size(cfg: DepthConfig) -> str:
  """Name of the size, or 'custom'."""
  for name, known in zip('SBL', _published(), strict=True):
    if dataclasses.replace(cfg, image_size=known.image_size) == known:
      return name
  return 'custom'
