"""Which tokens are predicted together: next token, next scale, random sets.

  scar sweep --sweep=configs/sweeps/order.py --workdir=runs/order

Words after the colon: see `common.py`; `paper` has no next scale, whose
checkpoints know classes only. 9 runs. The random order is not in the paper: it
is a column of our own.
"""

from configs.sweeps import common


def get_sweep(arg=None):
  sweep = common.base(arg, 'Order of prediction')
  words = common.given(arg)
  smoke = ',smoke' if words.smoke else ''
  if words.variant == 'paper':
    orders = ('raster', 'random')
    configs = tuple(
      f'configs/t2i512.py:control={words.control},order={name}{smoke}'
      for name in orders
    )
    sweep.zip = (('name', orders), ('config', configs))
    return sweep
  orders = ('raster', 'scale', 'random')
  scale = common.stage(
    words.variant, 'tokenizer', f',order=scale{smoke}', name='scale_tokenizer'
  )
  sweep.stages = (*sweep.stages, scale)
  sweep.zip = (
    ('name', orders),
    (
      'config',
      tuple(
        f'configs/{words.variant}.py:edit,order={name}{smoke}'
        for name in orders
      ),
    ),
    (
      'tokenizer.artifact',
      ('{tokenizer}', '{scale_tokenizer}', '{tokenizer}'),
    ),
  )
  return sweep
