"""Names of public CLIP checkpoints and where each tensor goes.

In: a torch state dict as numpy arrays, in the names of
huggingface/transformers `CLIPModel` or of one of its towers. Out: the `params`
of `CLIP`, or of the tower that a config names. Method 11.8 is the table.
"""

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
from scar_jax.convert.sizes import layers_of, public_heads, shape_of
from scar_jax.models.encoders.clip import (
  CLIP,
  CLIP_SIZES,
  CLIPConfig,
  CLIPText,
  CLIPTextConfig,
  CLIPVision,
  CLIPVisionConfig,
  clip_config,
)
from scar_jax.models.encoders.semantic import EncoderConfig, encoder_around
from scar_jax.types import PyTree

NetworkConfig = CLIPConfig | CLIPVisionConfig | CLIPTextConfig
# Parts of a whole model, as `detect` takes them.
PARTS = ('vision', 'text', 'both')
SKIP = (r'.*\.position_ids',)
# What a tower leaves out of a whole model.
_HEADS = (r'(visual|text)_projection\.weight', r'logit_scale')
_VISION, _TEXT = 'vision_model', 'text_model'


def _layers(root: str, tower: str) -> list[Entry]:
  layer, ours = f'{tower}.encoder.layers.{{i}}', f'{root}layers'
  qkv = [f'{layer}.self_attn.{n}_proj' for n in 'qkv']
  return [
    *affine(f'{ours}/norm1', f'{layer}.layer_norm1'),
    *affine(f'{ours}/norm2', f'{layer}.layer_norm2'),
    *linear(f'{ours}/attn/qkv', *qkv),
    *linear(f'{ours}/attn/out', f'{layer}.self_attn.out_proj', in_dims=2),
    *linear(f'{ours}/mlp/fc1', f'{layer}.mlp.fc1'),
    *linear(f'{ours}/mlp/fc2', f'{layer}.mlp.fc2'),
  ]


def vision_table(root: str = '') -> list[Entry]:
  """Rows of the image tower; `root` is put before our paths."""
  embed = f'{_VISION}.embeddings'
  return [
    Entry(f'{root}cls_token', (f'{embed}.class_embedding',)),
    Entry(f'{root}pos_embed', (f'{embed}.position_embedding.weight',)),
    *conv(f'{root}patch_embed/proj', f'{embed}.patch_embedding', bias=False),
    *affine(f'{root}pre_norm', f'{_VISION}.pre_layrnorm'),  # so spelt there
    *affine(f'{root}norm', f'{_VISION}.post_layernorm'),
    *_layers(root, _VISION),
  ]


def text_table(root: str = '') -> list[Entry]:
  """Rows of the text tower; `root` is put before our paths."""
  embed = f'{_TEXT}.embeddings'
  return [
    Entry(f'{root}token_embed', (f'{embed}.token_embedding.weight',)),
    Entry(f'{root}pos_embed', (f'{embed}.position_embedding.weight',)),
    *affine(f'{root}norm', f'{_TEXT}.final_layer_norm'),
    *_layers(root, _TEXT),
  ]


def table(cfg: NetworkConfig) -> list[Entry]:
  """Every tensor that the model of this config needs."""
  if isinstance(cfg, CLIPVisionConfig):
    return vision_table()
  if isinstance(cfg, CLIPTextConfig):
    return text_table()
  return [
    *vision_table('vision/'),
    *text_table('text/'),
    *linear('image_proj', 'visual_projection', bias=False),
    *linear('text_proj', 'text_projection', bias=False),
    Entry('logit_scale', ('logit_scale',)),
  ]


def convert(
  cfg: NetworkConfig | EncoderConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `CLIP`, `CLIPVision` or `CLIPText`, as `cfg` says.

  For an `EncoderConfig` those of its network, a `CLIPVision`.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  net = cfg.network() if isinstance(cfg, EncoderConfig) else cfg
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  if isinstance(net, CLIPTextConfig):
    model, given, skip = CLIPText(net), (ids,), (rf'{_VISION}\..*', *_HEADS)
  else:
    both = isinstance(net, CLIPConfig)
    patch = (net.vision if both else net).patch
    image = jax.ShapeDtypeStruct((1, patch, patch, 3), jnp.float32)
    model = CLIP(net) if both else CLIPVision(net)
    given = (image, ids) if both else (image,)
    skip = () if both else (rf'{_TEXT}\..*', *_HEADS)
  abstract = jax.eval_shape(model.init, jax.random.key(0), *given)
  return assemble(table(net), state, abstract['params'], (*SKIP, *skip))


def _common(
  shapes: Mapping[str, Any], tower: str, width: int
) -> dict[str, Any]:
  layers = f'{tower}.encoder.layers.'
  hidden = shape_of(shapes, f'{layers}0.mlp.fc1.weight')[0]
  return {
    'width': width,
    'depth': layers_of(layers, shapes),
    'hidden': 0 if hidden == 4 * width else hidden,
  }


def _detect_vision(
  shapes: Mapping[str, Any], heads: int | None
) -> CLIPVisionConfig:
  embed = f'{_VISION}.embeddings'
  rows, width = shape_of(shapes, f'{embed}.position_embedding.weight')
  return CLIPVisionConfig(
    patch=shape_of(shapes, f'{embed}.patch_embedding.weight')[-1],
    heads=public_heads(width, heads),
    table=math.isqrt(rows - 1),
    **_common(shapes, _VISION, width),
  )


def _detect_text(
  shapes: Mapping[str, Any], heads: int | None
) -> CLIPTextConfig:
  embed = f'{_TEXT}.embeddings'
  length, width = shape_of(shapes, f'{embed}.position_embedding.weight')
  return CLIPTextConfig(
    vocab=shape_of(shapes, f'{embed}.token_embedding.weight')[0],
    length=length,
    heads=public_heads(width, heads),
    **_common(shapes, _TEXT, width),
  )


def detect(
  state: Mapping[str, Any],
  part: str | None = None,
  heads: int | None = None,
  text_heads: int | None = None,
  image_size: int | None = None,
) -> EncoderConfig | CLIPConfig | CLIPTextConfig:
  """What a checkpoint holds, from shapes alone.

  The activation is in no tensor; OpenAI's is assumed.

  Args:
    state: torch tensors or their shapes.
    part: 'vision', the image tower as an encoder; 'text', its tower; 'both',
      the whole model, for scores. By default the first that is there.
    heads: of the image tower, 64 channels each by default.
    text_heads: the same of the text tower.
    image_size: pixels that the encoder is to see; 16 patches by default.

  Raises:
    ValueError: an unknown part; tensors that the sizes are read from are
      missing; a width that is no multiple of 64, and no heads given.
  """
  shapes = getattr(state, 'shapes', state)
  if part is None:
    vision = any(name.startswith(f'{_VISION}.') for name in shapes)
    part = 'vision' if vision else 'text'
  if part not in PARTS:
    raise ValueError(f'CLIP part={part!r}; accepted: {", ".join(PARTS)}')
  if part == 'text':
    return _detect_text(shapes, text_heads)
  network = _detect_vision(shapes, heads)
  if part == 'vision':
    return encoder_around(network, image_size=image_size)
  joint = shape_of(shapes, 'visual_projection.weight')[0]
  return CLIPConfig(network, _detect_text(shapes, text_heads), joint)


def artifact(
  cfg: EncoderConfig | CLIPConfig | CLIPTextConfig, params: PyTree
) -> tuple[str, Any, PyTree]:
  """An 'encoder', as `--config.encoder.artifact` takes it, or what it is."""
  if isinstance(cfg, EncoderConfig):
    return encoder_artifact(cfg, params)
  return ('clip' if isinstance(cfg, CLIPConfig) else 'clip_text'), cfg, params


def size(cfg: EncoderConfig | CLIPConfig | CLIPTextConfig) -> str:
  """Name of the size, or 'custom'; B/32 and B/16 share their text tower."""
  for name in CLIP_SIZES:
    named = clip_config(name)
    if isinstance(cfg, EncoderConfig):
      same = cfg.network() == named.vision
    else:
      same = cfg in (named, named.text)
    if same:
      return name
  return 'custom'
