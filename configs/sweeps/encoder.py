"""What sees the source: an encoder, the tokenizer's codes, or nothing.

  scar sweep --sweep=configs/sweeps/encoder.py --workdir=runs/encoder

Words after the colon: see `common.py`. In small, the trained encoder stands
for DINOv2, one that was trained for a few steps for a weak one, and `raw VQ`
embeds the source's own tokens (EditAR), pooled to as many as the prefix has;
15 runs. `paper` compares the converted networks of the paper's table; each
sees as many pixels as give it 32 x 32 patches.
"""

from configs.sweeps import common

PAPER = {
  'ViT-S': (12.37, None, 17.56),
  'SAM-B': (10.20, None, 15.57),
  'CLIP-B': (13.78, 55.43, 18.35),
  'DINOv2-B (SCAR)': (9.43, 81.76, 14.70),
}
_ARTIFACTS = ('vit_s', 'sam_b', 'clip_b', 'dinov2_b')


def get_sweep(arg=None):
  sweep = common.base(arg, 'Encoder', PAPER)
  setup = common.given(arg).variant
  if setup == 'paper':
    artifacts = tuple(f'artifacts/{name}' for name in _ARTIFACTS)
    names = tuple(PAPER)
  else:
    weak = common.stage(
      setup, 'encoder', ',smoke', name='weak_encoder', data__batch=8
    )
    sweep.stages = (*sweep.stages, weak)
    artifacts = ('{encoder}', '{weak_encoder}')
    names = ('trained encoder', 'barely trained encoder')
  more = ('raw VQ', 'raw VQ, pooled', 'none')
  kinds = ('vq', 'vq_pool', 'off')
  sweep.zip = (
    ('name', (*names, *more)),
    ('encoder.artifact', (*artifacts, *('',) * len(more))),
    ('prefix.compress', (*('full',) * len(names), *kinds)),
    # Without features there is nothing to preserve or to align with.
    ('loss.pres', (*(1.0,) * len(names), *(0.0,) * len(more))),
    ('loss.align', (*(0.5,) * len(names), *(0.0,) * len(more))),
  )
  return sweep
