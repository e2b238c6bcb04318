"""Prefill against injection while decoding: fusion and cross-attention.

  scar sweep --sweep=configs/sweeps/injection.py --workdir=runs/injection

Words after the colon: see `common.py`. 12 runs. An injection has no prefix to
align, so SCAR's prefix is trained without its two losses too. Fusion adds to
each token the uncompressed feature of its place, as ControlAR does;
cross-attention reads as many features as the prefix has positions.
"""

from configs.sweeps import common


def get_sweep(arg=None):
  sweep = common.base(arg, 'Prefill against injection while decoding')
  names = (
    'prefill (SCAR)', 'prefill, cross-entropy alone', 'fusion',
    'cross-attention',
  )  # fmt: skip
  sweep.zip = (
    ('name', names),
    ('prefix.inject', ('prefill', 'prefill', 'fusion', 'cross')),
    ('prefix.compress', ('full', 'full', 'none', 'full')),
    ('loss.pres', (1.0, 0.0, 0.0, 0.0)),
    ('loss.align', (0.5, 0.0, 0.0, 0.0)),
  )
  return sweep
