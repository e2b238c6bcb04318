"""Every ablation at once, each point one time: 16 points, 48 runs.

  scar sweep --sweep=configs/sweeps/all.py --workdir=runs/all

The other files are parts of it; SCAR itself, which each of them has, runs once
here. Words after the colon: see `common.py`.
"""

from configs.sweeps import common

# name, compression, k, how it enters, alignment, preservation
_POINTS = (
  ('SCAR', 'full', 2, 'prefill', 0.5, 1.0),
  ('compression: resize', 'resize', 2, 'prefill', 0.5, 0.0),
  ('compression: pixel-unshuffle', 'unshuffle', 2, 'prefill', 0.5, 0.0),
  ('compression: no L_pres', 'conv_resize', 2, 'prefill', 0.5, 0.0),
  ('compression: conv alone', 'conv', 2, 'prefill', 0.5, 1.0),
  ('ratio: 1x', 'none', 1, 'prefill', 0.5, 0.0),
  ('ratio: 16x', 'full', 4, 'prefill', 0.5, 1.0),
  ('alignment: 0', 'full', 2, 'prefill', 0.0, 1.0),
  ('alignment: 0.3', 'full', 2, 'prefill', 0.3, 1.0),
  ('alignment: 1', 'full', 2, 'prefill', 1.0, 1.0),
  ('alignment: 0, no L_pres', 'full', 2, 'prefill', 0.0, 0.0),
  ('injection: fusion', 'none', 1, 'fusion', 0.0, 0.0),
  ('injection: cross-attention', 'full', 2, 'cross', 0.0, 0.0),
  ('source: raw VQ', 'vq', 2, 'prefill', 0.0, 0.0),
  ('source: raw VQ, pooled', 'vq_pool', 2, 'prefill', 0.0, 0.0),
  ('source: none', 'off', 2, 'prefill', 0.0, 0.0),
)
_WITHOUT_ENCODER = ('vq', 'vq_pool', 'off')


def get_sweep(arg=None):
  sweep = common.base(arg, 'All ablations')
  encoder = common.encoder(arg)
  names, compress, k, inject, align, pres = zip(*_POINTS, strict=True)
  sweep.zip = (
    ('name', names),
    ('prefix.compress', compress),
    ('prefix.k', k),
    ('prefix.inject', inject),
    ('loss.align', align),
    ('loss.pres', pres),
    (
      'encoder.artifact',
      tuple('' if c in _WITHOUT_ENCODER else encoder for c in compress),
    ),
  )
  return sweep
