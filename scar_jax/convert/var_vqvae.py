"""Names of VAR's tokenizer checkpoint and where each tensor goes, both ways.

In: a torch state dict as numpy arrays (`vae_ch160v4096z32`). Out: the `params`
tree of `MSVQModel`, or its config from the tensors alone. The names are those
of FoundationVision/VAR `VQVAE`; method 11.5 is the table.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
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
from scar_jax.convert.llamagen_vq import res_block
from scar_jax.convert.sizes import count, shape_of, width_multiples
from scar_jax.models.tokenizers.msvq import MSVQModel
from scar_jax.models.tokenizers.msvq_config import MSVQConfig, msvq_config
from scar_jax.orders.scale import PATCH_NUMS
from scar_jax.types import PyTree

# A buffer of the reference: how often each scale used each code.
HITS = 'quantize.ema_vocab_hit_SV'
SKIP = (r'quantize\.ema_vocab_hit_SV',)
_PHI = 'quantize.quant_resi'


def _attn(path: str, source: str) -> Iterator[Entry]:
  """The reference has one convolution for q, k and v; ours has three."""
  yield from affine(f'{path}/norm', f'{source}.norm')
  for i, n in enumerate('qkv'):
    weight, bias = f'{source}.qkv.weight', f'{source}.qkv.bias'
    yield Entry(f'{path}/{n}/kernel', (weight,), 'conv', cut=(i, 3))
    yield Entry(f'{path}/{n}/bias', (bias,), cut=(i, 3))
  yield from conv(f'{path}/proj_out', f'{source}.proj_out')


def _half(cfg: MSVQConfig, part: str) -> Iterator[Entry]:
  """Encoder or decoder; `level` counts in the order of the data flow.

  The reference numbers the decoder's levels from full resolution down.
  """
  encoder = part == 'encoder'
  mults = cfg.ch_mult if encoder else cfg.ch_mult[::-1]
  last = len(mults) - 1
  yield from conv(f'{part}/conv_in', f'{part}.conv_in')
  width = 1 if encoder else mults[0]
  for level, mult in enumerate(mults):
    path = f'{part}/level_{level}'
    source = f'{part}.down.{level}' if encoder else f'{part}.up.{last - level}'
    for b in range(cfg.res_blocks + (not encoder)):
      name = f'{source}.block.{b}'
      yield from res_block(f'{path}_res_{b}', name, width != mult)
      width = mult
      if cfg.attn and level == (last if encoder else 0):
        yield from _attn(f'{path}_attn_{b}', f'{source}.attn.{b}')
    if level != last:
      ours, theirs = ('down', 'downsample') if encoder else ('up', 'upsample')
      yield from conv(f'{path}_{ours}/conv', f'{source}.{theirs}.conv')
  yield from res_block(f'{part}/mid_0', f'{part}.mid.block_1', False)
  if cfg.attn:
    yield from _attn(f'{part}/mid_1', f'{part}.mid.attn_1')
  yield from res_block(f'{part}/mid_2', f'{part}.mid.block_2', False)
  yield from affine(f'{part}/norm_out', f'{part}.norm_out')
  yield from conv(f'{part}/conv_out', f'{part}.conv_out')


def table(cfg: MSVQConfig) -> list[Entry]:
  """One row for each parameter of `MSVQModel(cfg)`."""
  phis = [f'{_PHI}.qresi_ls.{i}' for i in range(cfg.phis)]
  if cfg.phis == 1:
    phis = [f'{_PHI}.qresi']
  return [
    *_half(cfg, 'encoder'),
    *_half(cfg, 'decoder'),
    *conv('quant_conv', 'quant_conv'),
    *conv('post_quant_conv', 'post_quant_conv'),
    Entry('codebook', ('quantize.embedding.weight',)),
    *(
      entry
      for i, source in enumerate(phis)
      for entry in conv(f'phi_{i}/conv', source)
    ),
  ]


@functools.lru_cache(maxsize=8)  # tracing the model takes its time
def abstract_params(cfg: MSVQConfig) -> PyTree:
  """Shapes of `MSVQModel(cfg)`'s parameters, without making any."""
  size = cfg.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(MSVQModel(cfg).init, jax.random.key(0), images)[
    'params'
  ]


def convert(cfg: MSVQConfig, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Parameters of `MSVQModel(cfg)`.

  Args:
    cfg: sizes of the checkpoint.
    state: torch tensors.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  return assemble(table(cfg), state, abstract_params(cfg), SKIP)


def buffers(cfg: MSVQConfig) -> dict[str, np.ndarray]:
  """Tensors without weights that the reference's strict loading asks for."""
  return {HITS: np.zeros((len(cfg.patch_nums), cfg.codes), np.float32)}


def detect(
  state: Mapping[str, Any], patch_nums: Sequence[int] | None = None
) -> MSVQConfig:
  """The tokenizer that a checkpoint holds, from shapes alone.

  Args:
    state: torch tensors or their shapes.
    patch_nums: sides of the scales, which the file does not hold: one
      tokenizer serves 256, 512 and 1024 pixels. By default VAR's at 256 pixels,
      or at 1024 for a file whose buffer counts 14 scales.

  Raises:
    ValueError: tensors that the sizes are read from are missing, or scales
      that no default fits.
  """
  shapes = getattr(state, 'shapes', state)
  codes, code_dim = shape_of(shapes, 'quantize.embedding.weight')
  ch = shape_of(shapes, 'encoder.conv_in.weight')[0]
  first = 'encoder.down.{}.block.0.conv1.weight'
  shape_of(shapes, first.format(0))
  scales = shape_of(shapes, HITS)[0] if HITS in shapes else None
  return MSVQConfig(
    codes=codes,
    code_dim=code_dim,
    patch_nums=_sides(scales, patch_nums),
    phis=count(_PHI + '.qresi_ls.{}.weight', shapes) or 1,
    ch=ch,
    ch_mult=width_multiples(first, shapes, ch),
    res_blocks=count('encoder.down.0.block.{}.conv1.weight', shapes),
    attn='encoder.mid.attn_1.norm.weight' in shapes,
  )


def _sides(scales: int | None, given: Sequence[int] | None) -> tuple[int, ...]:
  """Sides of so many scales, where the file counts them."""
  if given is not None:
    if scales not in (None, len(given)):
      raise ValueError(
        f'patch_nums={tuple(given)} for a tokenizer of {scales} scales; '
        f'accepted: {scales} sides (set --patch_nums)'
      )
    return tuple(given)
  pixels = {None: 256, 10: 256, 14: 1024}.get(scales)
  if pixels is None:
    raise ValueError(
      f'a tokenizer of {scales} scales, whose sides the file does not hold; '
      'accepted: 10 or 14 scales, or sides (set --patch_nums)'
    )
  return PATCH_NUMS[pixels]


def size(cfg: MSVQConfig) -> str:
  """Name of the size, or 'custom'."""
  known = {msvq_config(f'var{pixels}'): pixels for pixels in PATCH_NUMS}
  return f'var{known[cfg]}' if cfg in known else 'custom'


def reverse(cfg: MSVQConfig, params: PyTree) -> dict[str, Any]:
  """The tensors of an artifact, under the reference's names.

  Raises:
    ValueError: a tokenizer that the reference's code cannot run.
  """
  if (cfg.groups, cfg.attn, cfg.patch, cfg.skip) != (32, True, 1, False):
    raise ValueError(
      f'a tokenizer with groups={cfg.groups}, attn={cfg.attn}, '
      f'patch={cfg.patch}, skip={cfg.skip} has no counterpart in VAR; '
      'accepted: 32, True, 1, False'
    )
  return disassemble(table(cfg), params)
