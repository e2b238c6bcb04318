"""Weight of the alignment loss: 0, 0.3, 0.5 and 1.

  scar sweep --sweep=configs/sweeps/delta.py --workdir=runs/delta

Words after the colon: see `common.py`. 12 runs. The paper takes 0.5; its
numbers for the other weights are not at hand.
"""

from configs.sweeps import common


def get_sweep(arg=None):
  sweep = common.base(arg, 'Weight of alignment')
  sweep.grid = (('loss.align', (0.0, 0.3, 0.5, 1.0)),)
  return sweep
