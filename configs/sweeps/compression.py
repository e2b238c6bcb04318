"""How features become a prefix: resize, pixel-unshuffle, conv and resize.

  scar sweep --sweep=configs/sweeps/compression.py --workdir=runs/compression

With and without the preservation loss, as in the paper, and the convolution
alone. Words after the colon: see `common.py`. 15 runs.
"""

from configs.sweeps import common

PAPER = {
  'resize': (10.07, 80.15, 15.78),
  'pixel-unshuffle': (9.82, 81.65, 15.48),
  'conv + resize, no L_pres': (9.89, 81.47, 15.21),
  'conv + resize (SCAR)': (9.43, 81.76, 14.70),
}


def get_sweep(arg=None):
  sweep = common.base(arg, 'Compression of the prefix', PAPER)
  sweep.zip = (
    ('name', (*PAPER, 'conv alone')),
    ('prefix.compress', ('resize', 'unshuffle', 'conv_resize', 'full', 'conv')),
    # Only the last two can restore the features.
    ('loss.pres', (0.0, 0.0, 0.0, 1.0, 1.0)),
  )
  return sweep
