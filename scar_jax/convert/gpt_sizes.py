"""Configs of LlamaGen, EditAR and SCAR checkpoints, and their artifacts.

In: shapes of tensors under the names of the reference. Out: an `EditorConfig`,
and back from an artifact to tensors. `editar.py` and `scar_official.py` have
the name tables that go with it. What no tensor shows (heads of an unpublished
size, pixels of a target) is asked for.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from scar_jax.convert.sizes import layers_of, shape_of
from scar_jax.models.decoder import SIZES, DecoderConfig, decoder_size
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.text_embedder import TextCondition
from scar_jax.parts import EditorConfig, TextSetup
from scar_jax.types import PyTree

_DOWNSAMPLE = 16  # pixels per token and side, of the tokenizer they go with
_IMAGE_SIZE = 256
_CLASSES = 'cls_embedding.embedding_table.weight'
_NULL_TEXT = 'cls_embedding.uncond_embedding'


def detect_decoder(
  shapes: Mapping[str, Any], heads: int | None = None
) -> DecoderConfig:
  """Sizes of the transformer.

  Args:
    shapes: of the tensors.
    heads: needed where neither a published size nor a rotary table says it.

  Raises:
    ValueError: no embeddings, or an unknown number of heads.
  """
  vocab, width = shape_of(shapes, 'tok_embeddings.weight')
  layers = layers_of('layers.', shapes)
  named = [
    fields
    for name, fields in SIZES.items()
    if fields['width'] == width and fields['layers'] == layers
    and fields.get('block', 'llama') == 'llama'
  ]  # fmt: skip
  if heads is None and named:
    heads = named[0]['heads']
  if heads is None and 'freqs_cis' in shapes:
    heads = width // (2 * shapes['freqs_cis'].shape[1])
  if heads is None:
    raise ValueError(
      f'the number of heads cannot be detected: no published size has width '
      f'{width} and {layers} layers; accepted: a divisor of the width (set '
      '--heads)'
    )
  cfg = DecoderConfig(width=width, layers=layers, heads=heads, vocab=vocab)
  w1 = 'layers.0.feed_forward.w1.weight'
  if w1 in shapes and shapes[w1].shape[0] != cfg.hidden:
    cfg = dataclasses.replace(cfg, mlp_hidden=shapes[w1].shape[0])
  return cfg


def _grid(
  shapes: Mapping[str, Any], text: int, image_size: int | None, null: bool
) -> tuple[int, int]:
  """Grid of the target: from the null image, the rotary table, or asked."""
  tokens = 0
  if null and 'img_uncond_embedding' in shapes:
    tokens = shapes['img_uncond_embedding'].shape[0]
  elif 'freqs_cis' in shapes and not null:
    tokens = shapes['freqs_cis'].shape[0] - text
  side = math.isqrt(max(tokens, 0))
  if side * side != tokens or not side:
    side = (image_size or _IMAGE_SIZE) // _DOWNSAMPLE
  if image_size not in (None, side * _DOWNSAMPLE):
    raise ValueError(
      f'--image_size={image_size}; accepted: {side * _DOWNSAMPLE}, as the '
      f'checkpoint has {side}x{side} tokens of {_DOWNSAMPLE} pixels'
    )
  return side, side


def _text(shapes: Mapping[str, Any], mask_pad: bool) -> TextCondition:
  if _NULL_TEXT in shapes:
    length, width = shapes[_NULL_TEXT].shape
    return TextCondition('t5', length, width, mask_pad=mask_pad)
  classes = shapes[_CLASSES].shape[0] - 1 if _CLASSES in shapes else 1000
  return TextCondition('label', classes=classes)


def detect_editor(
  state: Mapping[str, Any],
  kind: str,
  heads: int | None = None,
  image_size: int | None = None,
  tokenizer: str = '',
  encoder: str = '',
  text: str = '',
) -> EditorConfig:
  """The model that a checkpoint holds, from shapes alone.

  Args:
    state: torch tensors or their shapes.
    kind: 'llamagen', 'editar' or 'scar'.
    heads: see `detect_decoder`.
    image_size: pixels of the target where no tensor says it; 256 if not given.
    tokenizer: artifact to record, as the next two.
    encoder: see there.
    text: see there.

  Raises:
    ValueError: tensors that the sizes are read from are missing, or `heads` or
      `image_size` are needed or do not fit.
  """
  shapes = getattr(state, 'shapes', state)
  decoder = detect_decoder(shapes, heads)
  # LlamaGen moves captions to the right end and hides what is left of them.
  condition = _text(shapes, mask_pad=kind == 'llamagen')
  grid = _grid(shapes, condition.positions, image_size, kind != 'llamagen')
  out = decoder.width
  if kind == 'llamagen':
    prefix = PrefixConfig('off', grid=grid, out=out)
  elif kind == 'editar':
    prefix = PrefixConfig('vq', grid=grid, width=out, out=out, null='fixed')
  else:
    width = shape_of(shapes, 'downsample_conv.weight')[0]
    # Of encoder patches at 14/16 of the target's size: as many as tokens.
    step = (-(-grid[0] // 2) * 2, -(-grid[1] // 2) * 2)
    prefix = PrefixConfig('full', k=2, grid=step, width=width, out=out)
  model = ScarConfig(
    decoder=decoder,
    prefix=prefix,
    text=condition,
    grid=grid,
    prefix_mask='causal',
    text_rope='zero',
    cond_dropout='joint' if kind == 'editar' else 'text',
    token_dropout_scope='all' if kind == 'llamagen' else 'text',
  )
  pad = 'left' if kind == 'llamagen' else 'right'
  return EditorConfig(
    model=model,
    text=TextSetup(condition.kind, condition.length, pad=pad),
    image_size=grid[0] * _DOWNSAMPLE,
    tokenizer=tokenizer,
    encoder=encoder,
    text_encoder=text,
  )


def size(cfg: EditorConfig) -> str:
  """Name of the decoder's size, or 'custom'."""
  got = cfg.model.decoder
  for name in SIZES:
    known = decoder_size(name)
    if all(
      getattr(known, f) == getattr(got, f)
      for f in ('width', 'layers', 'heads', 'hidden', 'vocab', 'block')
    ):
      return name
  return 'custom'


def model_of(cfg: ScarConfig | EditorConfig) -> ScarConfig:
  """The model alone."""
  return cfg.model if isinstance(cfg, EditorConfig) else cfg


def artifact(
  cfg: EditorConfig, params: PyTree
) -> tuple[str, EditorConfig, PyTree]:
  """What `Editor.load` and `--config.init_from` take."""
  return 'scar', cfg, params
