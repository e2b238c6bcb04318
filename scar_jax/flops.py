"""FLOPs that a training step or a sampling run cannot do without.

In: a `ScarConfig` and the configs of the frozen networks. Out: FLOPs by part of
the model, counted from shapes alone: 2 for each multiply-add of matrix products
and convolutions, attention by the area of its mask, nothing for what a
rematerialisation computes again. Norms, softmax and resizing are left out.
Called by `scar plan` and by the trainer, for model-FLOPs utilisation.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from scar_jax.flops_networks import (
  conv_flops,
  encoder_flops,
  t5_flops,
  tokenizer_decode_flops,
  tokenizer_encode_flops,
)
from scar_jax.models.decoder import DecoderConfig
from scar_jax.models.inject import depths
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar_config import ScarConfig

# Backward passes cost twice the forward pass: gradients of input and of weight.
# Where the input is data or frozen features, the first of them is not needed.
_TRAINED, _FROM_DATA, _FORWARD = 3, 2, 1
Parts = dict[str, float]


def step_flops(
  cfg: ScarConfig,
  batch: int,
  networks: Mapping[str, Any] | None = None,
  image_size: int = 0,
  align: bool = True,
  preserve: bool = True,
  stop_target_grad: bool = False,
) -> Parts:
  """FLOPs of one optimiser step, all devices together.

  Args:
    cfg: of the model.
    batch: images of the step, over all devices and microbatches.
    networks: configs of the frozen networks that run inside the step, by name:
      'tokenizer', 'encoder', 'text'. An absent one costs nothing, as where its
      outputs are read from a cache.
    image_size: pixels of a target, for the tokenizer.
    align: the alignment loss is on.
    preserve: the preservation loss is on.
    stop_target_grad: alignment sends no gradient through the target's features.

  Returns:
    Part -> FLOPs; the sum of the values is that of the step.
  """
  networks = networks or {}
  align = align and cfg.aligns
  prefix = cfg.prefix
  parts: Parts = {
    name: _TRAINED * flops for name, flops in _decoder(cfg).items()
  }
  parts['text'] = sum(
    kind * flops for kind, flops in _text(cfg, _TRAINED, _FROM_DATA)
  )
  first = _TRAINED if prefix.from_tokens else _FROM_DATA
  compress, project = _compress(prefix), _project(prefix)
  convolves = bool(compress)
  through = _TRAINED if convolves else first
  parts['prefix'] = first * compress + through * project
  if preserve and prefix.restores:
    parts['prefix'] += _TRAINED * _restore(prefix)
  if align:
    # The features of the target go the same way; they are data.
    first = through = _FORWARD
    if not stop_target_grad:
      first, through = _FROM_DATA, _TRAINED if convolves else _FROM_DATA
    parts['prefix'] += first * compress + through * project
  parts['inject'] = _TRAINED * _inject(cfg)
  if cfg.order == 'scale':
    parts['prefix'] += _FROM_DATA * _words(cfg)
  parts |= _frozen(cfg, networks, images=2 if align else 1)
  if 'tokenizer' in networks:
    parts['tokenizer'] = tokenizer_encode_flops(
      networks['tokenizer'], image_size, sums=cfg.order == 'scale'
    ) * (2 if prefix.from_tokens else 1)
  return {name: batch * flops for name, flops in parts.items() if flops}


def sample_flops(
  cfg: ScarConfig,
  batch: int,
  branches: int = 1,
  networks: Mapping[str, Any] | None = None,
  image_size: int = 0,
) -> Parts:
  """FLOPs of sampling a batch with a cache, in the order as trained.

  Args:
    cfg: of the model.
    batch: images.
    branches: of guidance, 1 without.
    networks: see `step_flops`; the tokenizer decodes.
    image_size: pixels of a result.
  """
  networks = networks or {}
  parts: Parts = {name: branches * f for name, f in _decoder(cfg).items()}
  parts['text'] = branches * sum(flops for _, flops in _text(cfg, 1, 1))
  prefix = _compress(cfg.prefix) + _project(cfg.prefix)
  parts['prefix'] = branches * prefix
  parts['inject'] = branches * _inject(cfg)
  if cfg.order == 'scale':
    parts['prefix'] += branches * _words(cfg)
  parts |= _frozen(cfg, networks, images=1)
  if 'tokenizer' in networks:
    parts['tokenizer'] = tokenizer_decode_flops(
      networks['tokenizer'], image_size
    )
  return {name: batch * flops for name, flops in parts.items() if flops}


def mask_area(set_ids: Int[np.ndarray, ' L']) -> int:
  """Pairs of query and key that the set mask allows, padding ignored."""
  ids = np.sort(np.asarray(set_ids))
  return int(np.searchsorted(ids, ids, side='right').sum())


def _decoder(cfg: ScarConfig) -> Parts:
  """Forward FLOPs of one teacher-forced sequence."""
  dec, layout = cfg.decoder, cfg.make_layout()
  length, D = layout.length, dec.width
  ffn = (2 if dec.block == 'adaln' else 3) * D * dec.hidden
  layers = dec.layers * length * (4 * D * D + ffn)
  return {
    'layers': 2.0 * (layers + _conditioning(dec)),
    # Two products: queries with keys, weights with values.
    'attention': 2.0 * dec.layers * 2 * D * mask_area(layout.set_ids),
    'head': 2.0 * len(layout.logit_index) * D * dec.vocab,
  }


def _conditioning(dec: DecoderConfig) -> float:
  """Multiply-adds of the AdaLN projections of one sample."""
  if dec.block != 'adaln':
    return 0.0
  blocks = 1 if dec.shared_ada else dec.layers
  return blocks * 6 * dec.width**2 + 2 * dec.width**2


def _compress(cfg: PrefixConfig) -> float:
  """Forward FLOPs of the strided convolutions of one image."""
  if cfg.compress not in ('full', 'conv_resize', 'conv', 'vq_pool'):
    return 0.0
  (h, w), total, step = cfg.grid, 0.0, cfg.step
  while step > 1:
    h, w, step = h // 2, w // 2, step // 2
    total += conv_flops((h, w), cfg.width, cfg.width, stride=2)
  return total


def _restore(cfg: PrefixConfig) -> float:
  """Forward FLOPs of the preservation decoder of one image."""
  (h, w), total, step = cfg.out_grid or (0, 0), 0.0, cfg.step
  while step > 1:
    total += conv_flops((h, w), cfg.width, 4 * cfg.width)
    h, w, step = 2 * h, 2 * w, step // 2
  return total + conv_flops((h, w), cfg.width, cfg.width)


def _project(cfg: PrefixConfig) -> float:
  """Forward FLOPs from compressed features to prefix embeddings."""
  if cfg.from_tokens or cfg.compress == 'off':
    return 0.0
  inputs = cfg.width * (cfg.step**2 if cfg.compress == 'unshuffle' else 1)
  return 2.0 * cfg.length * inputs * cfg.out


def _inject(cfg: ScarConfig) -> float:
  """Forward FLOPs of the baselines without a prefix, see `models/inject.py`."""
  P, D = cfg.prefix.length, cfg.decoder.width
  layout, kind = cfg.make_layout(), cfg.prefix.inject
  each = {
    'prefill': 0,
    'fusion': 2 * len(layout.logit_index) * D * D,
    # Keys and values, queries and output, the two products of attention.
    'cross': 2 * P * D * D + 2 * layout.length * D * (D + P),
  }[kind]
  return 2.0 * len(depths(cfg.decoder.layers)) * each


def _text(
  cfg: ScarConfig, trained: int, from_data: int
) -> list[tuple[int, float]]:
  """Passes and forward FLOPs of the parts of the text embedder."""
  text, D = cfg.text, cfg.decoder.width
  if text.kind in ('none', 'label'):
    return []
  learns = text.kind == 'byte' or text.null == 'learned'
  found = [
    (trained if learns else from_data, 2.0 * text.length * text.features * D),
    (trained, 2.0 * text.length * D * D),
  ]
  if text.encoder is not None:
    found.append((trained, t5_flops(text.encoder, text.length)))
  if cfg.order == 'scale':  # the pooled text
    found.append((trained, 2.0 * D * D))
  return found


def _words(cfg: ScarConfig) -> float:
  """Forward FLOPs from the latents of all scales but the first to inputs."""
  count = cfg.make_layout().target_len - cfg.make_order().set_sizes[0]
  return 2.0 * count * cfg.latent_dim * cfg.decoder.width


def _frozen(cfg: ScarConfig, networks: Mapping[str, Any], images: int) -> Parts:
  """Forward FLOPs of the encoder on so many images, and of a T5."""
  parts: Parts = {}
  if 'encoder' in networks:
    parts['encoder'] = images * encoder_flops(networks['encoder'])
  if 'text' in networks:
    parts['text_encoder'] = t5_flops(networks['text'], cfg.text.length)
  return parts
