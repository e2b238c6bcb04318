"""What the two extra losses are for: alignment and preservation, on and off.

  scar sweep --sweep=configs/sweeps/alignment.py --workdir=runs/alignment

Words after the colon: see `common.py`. 12 runs, every combination.
"""

from configs.sweeps import common


def get_sweep(arg=None):
  sweep = common.base(arg, 'Alignment and preservation')
  sweep.grid = (('loss.align', (0.0, 0.5)), ('loss.pres', (0.0, 1.0)))
  return sweep
