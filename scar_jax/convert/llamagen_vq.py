"""Names of the public LlamaGen VQ checkpoints and where each one goes.

In: a torch state dict as numpy arrays (`vq_ds16_c2i`, `vq_ds8_c2i`,
`vq_ds16_t2i`). Out: the `params` tree of `VQModel`. The names are those of
FoundationVision/LlamaGen `VQModel`; method 11.1 is the table.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scar_jax.models.tokenizers.vq import VQConfig

# Buffers of the reference that hold no weight.
SKIP = ('quantize.codebook_used',)

Entry = tuple[str, tuple[str, ...], str]


def _norm(src: str, dst: tuple[str, ...]) -> Iterator[Entry]:
  yield f'{src}.weight', (*dst, 'scale'), 'same'
  yield f'{src}.bias', (*dst, 'bias'), 'same'


def _conv(src: str, dst: tuple[str, ...]) -> Iterator[Entry]:
  yield f'{src}.weight', (*dst, 'kernel'), 'conv'
  yield f'{src}.bias', (*dst, 'bias'), 'same'


def _res(src: str, dst: tuple[str, ...], widens: bool) -> Iterator[Entry]:
  for n in ('1', '2'):
    yield from _norm(f'{src}.norm{n}', (*dst, f'norm{n}'))
    yield from _conv(f'{src}.conv{n}', (*dst, f'conv{n}'))
  if widens:
    yield from _conv(f'{src}.nin_shortcut', (*dst, 'nin_shortcut'))


def _attn(src: str, dst: tuple[str, ...]) -> Iterator[Entry]:
  yield from _norm(f'{src}.norm', (*dst, 'norm'))
  for n in ('q', 'k', 'v', 'proj_out'):
    yield from _conv(f'{src}.{n}', (*dst, n))


def _half(cfg: VQConfig, part: str) -> Iterator[Entry]:
  """Encoder or decoder."""
  encoder = part == 'encoder'
  mults = cfg.ch_mult if encoder else cfg.ch_mult[::-1]
  last = len(mults) - 1
  yield from _conv(f'{part}.conv_in', (part, 'conv_in'))
  width = 1 if encoder else mults[0]
  for level, mult in enumerate(mults):
    src, dst = f'{part}.conv_blocks.{level}', f'level_{level}'
    for b in range(cfg.res_blocks + (not encoder)):
      yield from _res(f'{src}.res.{b}', (part, f'{dst}_res_{b}'), width != mult)
      width = mult
      if cfg.attn and level == (last if encoder else 0):
        yield from _attn(f'{src}.attn.{b}', (part, f'{dst}_attn_{b}'))
    if level != last:
      step, ours = ('downsample', 'down') if encoder else ('upsample', 'up')
      yield from _conv(f'{src}.{step}.conv', (part, f'{dst}_{ours}', 'conv'))
  yield from _res(f'{part}.mid.0', (part, 'mid_0'), False)
  if cfg.attn:
    yield from _attn(f'{part}.mid.1', (part, 'mid_1'))
  yield from _res(f'{part}.mid.2', (part, 'mid_2'), False)
  yield from _norm(f'{part}.norm_out', (part, 'norm_out'))
  yield from _conv(f'{part}.conv_out', (part, 'conv_out'))


def table(cfg: VQConfig) -> list[Entry]:
  """Every tensor of the checkpoint: (its name, our path, rule).

  The rule is 'conv' (OIHW to HWIO) or 'same'.
  """
  return [
    *_half(cfg, 'encoder'),
    *_half(cfg, 'decoder'),
    *_conv('quant_conv', ('quant_conv',)),
    *_conv('post_quant_conv', ('post_quant_conv',)),
    ('quantize.embedding.weight', ('codebook',), 'same'),
  ]


def convert(cfg: VQConfig, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The `params` of `VQModel(cfg)` from a state dict.

  Raises:
    ValueError: missing or unmatched tensors, all of them listed.
  """
  entries = table(cfg)
  names = {src for src, _, _ in entries}
  missing = sorted(names - set(state))
  extra = sorted(set(state) - names - set(SKIP))
  if missing or extra:
    raise ValueError(f'missing {missing}, unmatched {extra}; given {cfg}')
  params: dict[str, Any] = {}
  for src, path, rule in entries:
    value = np.asarray(state[src], np.float32)
    if rule == 'conv':
      value = value.transpose(2, 3, 1, 0)
    node = params
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return params
