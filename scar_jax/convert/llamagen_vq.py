"""Names of the public LlamaGen VQ checkpoints and where each tensor goes.

In: a torch state dict as numpy arrays (`vq_ds16_c2i`, `vq_ds8_c2i`,
`vq_ds16_t2i`). Out: the `params` tree of `VQModel`. The names are those of
FoundationVision/LlamaGen `VQModel`; method 11.1 is the table.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert.common import (
  Entry,
  affine,
  assemble,
  conv,
  disassemble,
)
from scar_jax.convert.sizes import count, shape_of, width_multiples
from scar_jax.models.tokenizers.vq import VQConfig, VQModel, vq_config
from scar_jax.types import PyTree

# A buffer of the reference that holds no weight.
SKIP = (r'quantize\.codebook_used',)


def res_block(path: str, source: str, widens: bool) -> Iterator[Entry]:
  """Rows of a `ResnetBlock`; one that widens has a shortcut."""
  for n in ('1', '2'):
    yield from affine(f'{path}/norm{n}', f'{source}.norm{n}')
    yield from conv(f'{path}/conv{n}', f'{source}.conv{n}')
  if widens:
    yield from conv(f'{path}/nin_shortcut', f'{source}.nin_shortcut')


def _attn(path: str, source: str) -> Iterator[Entry]:
  yield from affine(f'{path}/norm', f'{source}.norm')
  for n in ('q', 'k', 'v', 'proj_out'):
    yield from conv(f'{path}/{n}', f'{source}.{n}')


def _half(cfg: VQConfig, part: str) -> Iterator[Entry]:
  """Encoder or decoder; `level` counts in the order of the data flow."""
  encoder = part == 'encoder'
  mults = cfg.ch_mult if encoder else cfg.ch_mult[::-1]
  last = len(mults) - 1
  yield from conv(f'{part}/conv_in', f'{part}.conv_in')
  width = 1 if encoder else mults[0]
  for level, mult in enumerate(mults):
    path, source = f'{part}/level_{level}', f'{part}.conv_blocks.{level}'
    for b in range(cfg.res_blocks + (not encoder)):
      yield from res_block(
        f'{path}_res_{b}', f'{source}.res.{b}', width != mult
      )
      width = mult
      if cfg.attn and level == (last if encoder else 0):
        yield from _attn(f'{path}_attn_{b}', f'{source}.attn.{b}')
    if level != last:
      ours, theirs = ('down', 'downsample') if encoder else ('up', 'upsample')
      yield from conv(f'{path}_{ours}/conv', f'{source}.{theirs}.conv')
  yield from res_block(f'{part}/mid_0', f'{part}.mid.0', False)
  if cfg.attn:
    yield from _attn(f'{part}/mid_1', f'{part}.mid.1')
  yield from res_block(f'{part}/mid_2', f'{part}.mid.2', False)
  yield from affine(f'{part}/norm_out', f'{part}.norm_out')
  yield from conv(f'{part}/conv_out', f'{part}.conv_out')


def table(cfg: VQConfig) -> list[Entry]:
  """One row for each parameter of `VQModel(cfg)`."""
  return [
    *_half(cfg, 'encoder'),
    *_half(cfg, 'decoder'),
    *conv('quant_conv', 'quant_conv'),
    *conv('post_quant_conv', 'post_quant_conv'),
    Entry('codebook', ('quantize.embedding.weight',)),
  ]


@functools.lru_cache(maxsize=8)  # tracing the model takes its time
def abstract_params(cfg: VQConfig) -> PyTree:
  """Shapes of `VQModel(cfg)`'s parameters, without making any."""
  side = cfg.downsample
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return jax.eval_shape(VQModel(cfg).init, jax.random.key(0), images)['params']


def convert(cfg: VQConfig, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Parameters of `VQModel(cfg)`.

  Args:
    cfg: sizes of the checkpoint.
    state: what lies under its key `model`, or `ema` if present.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  return assemble(table(cfg), state, abstract_params(cfg), SKIP)


def detect(state: Mapping[str, Any]) -> VQConfig:
  """The tokenizer that a checkpoint holds, from shapes alone.

  Raises:
    ValueError: tensors that the sizes are read from are missing, or widths
      that are no multiple of the first one.
  """
  shapes = getattr(state, 'shapes', state)
  codes, code_dim = shape_of(shapes, 'quantize.embedding.weight')
  ch = shape_of(shapes, 'encoder.conv_in.weight')[0]
  first = 'encoder.conv_blocks.{}.res.0.conv1.weight'
  return VQConfig(
    codes=codes,
    code_dim=code_dim,
    ch=ch,
    ch_mult=width_multiples(first, shapes, ch),
    res_blocks=count('encoder.conv_blocks.0.res.{}.conv1.weight', shapes),
    z_channels=shape_of(shapes, 'quant_conv.weight')[1],
    attn='encoder.mid.1.q.weight' in shapes,
  )


def size(cfg: VQConfig) -> str:
  """Name of the size, or 'custom'."""
  known = {vq_config(name): name for name in ('vq16', 'vq8')}
  return known.get(cfg, 'custom')


def reverse(cfg: VQConfig, params: PyTree) -> dict[str, Any]:
  """The tensors of an artifact, under the reference's names.

  Raises:
    ValueError: a tokenizer that the reference's code cannot run.
  """
  reference = dict(patch=1, skip=False, groups=32, l2_norm=True, attn=True)
  other = {k: getattr(cfg, k) for k, v in reference.items()
           if getattr(cfg, k) != v}  # fmt: skip
  if other:
    raise ValueError(
      f'a tokenizer with {other} has no counterpart in LlamaGen; accepted: '
      f'{reference}'
    )
  return disassemble(table(cfg), params)
