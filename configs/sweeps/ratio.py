"""How many prefix tokens: 1, 4 or 16 features for each.

  scar sweep --sweep=configs/sweeps/ratio.py --workdir=runs/ratio

Words after the colon: see `common.py`. 9 runs. On OpenMoji's 12 x 12 and the
scenes' 8 x 8 features all three divide.
"""

from configs.sweeps import common

PAPER = {
  '1x': (9.29, 81.95, 14.61),
  '4x (SCAR)': (9.43, 81.76, 14.70),
  '16x': (10.74, 79.66, 16.10),
}


def get_sweep(arg=None):
  sweep = common.base(arg, 'Compression ratio', PAPER)
  sweep.zip = (('name', tuple(PAPER)), ('prefix.k', (1, 2, 4)))
  return sweep
