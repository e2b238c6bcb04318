"""SCAR beside what it replaces, trained to the end: raw VQ codes, no alignment.

  scar sweep --sweep=configs/sweeps/source.py:openmoji --workdir=runs/source

Words after the colon: see `common.py`. 9 runs, each with all the steps of its
recipe. `raw VQ` embeds the source's own tokens (EditAR), as many as the target
has: four times SCAR's prefix.
"""

from configs.sweeps import common


def get_sweep(arg=None):
  sweep = common.base(arg, 'Source')
  encoder = common.encoder(arg)
  sweep.zip = (
    ('name', ('SCAR', 'no alignment', 'raw VQ')),
    ('encoder.artifact', (encoder, encoder, '')),
    ('prefix.compress', ('full', 'full', 'vq')),
    ('loss.align', (0.5, 0.0, 0.0)),
    # Without features there is nothing to preserve.
    ('loss.pres', (1.0, 1.0, 0.0)),
  )
  return sweep
