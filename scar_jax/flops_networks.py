"""Forward FLOPs of the frozen networks for one image or one text.

In: the config of a tokenizer, a semantic encoder or a T5, and sizes. Out: FLOPs
from shapes, 2 for each multiply-add of matrix products and convolutions; taps
on padding are left out. Called by `flops.py`.
"""

from typing import Any

from scar_jax.models.encoders.semantic import EncoderConfig, encoder_grid
from scar_jax.models.encoders.t5 import T5Config
from scar_jax.models.tokenizers.make import is_multi_scale
from scar_jax.models.tokenizers.vq import VQConfig


def t5_flops(cfg: T5Config, length: int) -> float:
  """A T5 encoder over `length` positions."""
  inner = cfg.heads * cfg.head_dim
  per_token = 4 * cfg.width * inner + 3 * cfg.width * cfg.ffn
  attention = 2 * length * inner
  return 2.0 * cfg.layers * length * (per_token + attention)


def encoder_flops(cfg: EncoderConfig) -> float:
  """A semantic encoder for one image; attention sees the whole image."""
  rows, columns = encoder_grid(cfg)
  patches, D = rows * columns, cfg.width
  embed = 2.0 * patches * 3 * cfg.patch**2 * D
  network: Any = cfg.network()
  if cfg.ffn == 'swiglu':
    ffn = 3 * D * ((8 * D // 3 + 7) // 8 * 8)
  else:
    ffn = 2 * D * (getattr(network, 'hidden', 0) or 4 * D)
  if cfg.kind == 'sam':
    return embed + _sam_layers(cfg, rows, columns, ffn)
  tokens = patches + cfg.extra_tokens
  layer = tokens * (4 * D * D + ffn) + 2 * tokens**2 * D
  return embed + 2.0 * cfg.depth * layer


def _sam_layers(cfg: EncoderConfig, rows: int, columns: int, ffn: int) -> float:
  """Layers in windows and over the whole image, with their position terms."""
  D, patches, total = cfg.width, rows * columns, 0.0
  for layer in range(cfg.depth):
    tokens, seen, sides = patches, patches, rows + columns
    if layer not in cfg.global_layers:
      side = cfg.window
      windows = -(-rows // side) * -(-columns // side)
      tokens, seen, sides = windows * side**2, side**2, 2 * side
    attention = tokens * (4 * D * D + 2 * seen * D + sides * D)
    total += 2.0 * (attention + patches * ffn)
  return total


def tokenizer_encode_flops(
  cfg: Any, image_size: int, sums: bool = False
) -> float:
  """From one image to its tokens.

  Args:
    cfg: config of either tokenizer.
    image_size: pixels, square.
    sums: the codes are added up once more, as the inputs of the scale order.
  """
  if not is_multi_scale(cfg):
    places = (image_size // cfg.downsample) ** 2
    quantise = places * cfg.code_dim * (cfg.z_channels + cfg.codes)
    return _encoder(cfg, image_size) + 2.0 * quantise
  phi = _conv(cfg.side, cfg.code_dim, cfg.code_dim)
  phis = len(cfg.patch_nums) * phi
  nearest = 2.0 * cfg.num_tokens * cfg.codes * cfg.code_dim
  total = _encoder(cfg.backbone, image_size) + phi + phis + nearest
  return total + phis if sums else total


def tokenizer_decode_flops(cfg: Any, image_size: int) -> float:
  """From the tokens of one image to its pixels; the scales' sums included."""
  if not is_multi_scale(cfg):
    places = (image_size // cfg.downsample) ** 2
    post = 2.0 * places * cfg.code_dim * cfg.z_channels
    return post + _decoder(cfg, image_size)
  phi = _conv(cfg.side, cfg.code_dim, cfg.code_dim)
  phis = (len(cfg.patch_nums) + 1) * phi
  return phis + _decoder(cfg.backbone, image_size)


def conv_flops(
  grid: tuple[int, int], inputs: int, outputs: int, stride: int = 1
) -> float:
  """A 3x3 convolution padded by one; at stride 2 by one in all.

  Args:
    grid: (h, w) of its output.
    inputs: channels.
    outputs: channels.
    stride: 1, where both ends of an axis meet padding, or 2, where one does.
  """
  rows, columns = (3 * side - (2 if stride == 1 else 1) for side in grid)
  return 2.0 * rows * columns * inputs * outputs


def _conv(side: int, inputs: int, outputs: int, window: int = 3) -> float:
  if window == 3:
    return conv_flops((side, side), inputs, outputs)
  return 2.0 * side**2 * inputs * outputs


def _res(side: int, inputs: int, outputs: int) -> float:
  shortcut = _conv(side, inputs, outputs, 1) if inputs != outputs else 0.0
  return _conv(side, inputs, outputs) + _conv(side, outputs, outputs) + shortcut


def _attention(side: int, channels: int) -> float:
  return _conv(side, channels, 4 * channels, 1) + 4.0 * side**4 * channels


def _middle(cfg: VQConfig, side: int) -> float:
  width = cfg.ch * cfg.ch_mult[-1]
  attention = _attention(side, width) if cfg.attn else 0.0
  return 2 * _res(side, width, width) + attention


def _flat(cfg: VQConfig, size: int) -> float:
  """The linear path around encoder or decoder."""
  pixels = 3 * cfg.downsample**2
  return _conv(size // cfg.downsample, pixels, cfg.z_channels, 1)


def _encoder(cfg: VQConfig, size: int) -> float:
  if cfg.local:
    return _flat(cfg, size)
  side, width = size // cfg.patch, cfg.ch
  total = _conv(side, 3 * cfg.patch**2, width)
  last = len(cfg.ch_mult) - 1
  for level, mult in enumerate(cfg.ch_mult):
    for _ in range(cfg.res_blocks):
      total += _res(side, width, cfg.ch * mult)
      width = cfg.ch * mult
      if level == last and cfg.attn:
        total += _attention(side, width)
    if level != last:
      side //= 2
      total += conv_flops((side, side), width, width, stride=2)
  total += _middle(cfg, side) + _conv(side, width, cfg.z_channels)
  return total + (_flat(cfg, size) if cfg.skip else 0.0)


def _decoder(cfg: VQConfig, size: int) -> float:
  side, width = size // cfg.downsample, cfg.ch * cfg.ch_mult[-1]
  total = _conv(side, cfg.z_channels, width) + _middle(cfg, side)
  last = len(cfg.ch_mult) - 1
  for level, mult in enumerate(reversed(cfg.ch_mult)):
    for _ in range(cfg.res_blocks + 1):
      total += _res(side, width, cfg.ch * mult)
      width = cfg.ch * mult
      if level == 0 and cfg.attn:
        total += _attention(side, width)
    if level != last:
      side *= 2
      total += _conv(side, width, width)
  total += _conv(side, width, 3 * cfg.patch**2)
  return total + (_flat(cfg, size) if cfg.skip else 0.0)
