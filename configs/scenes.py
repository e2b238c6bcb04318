"""Procedural scenes with exact truth; the words are those of openmoji.py.

  scar train --config=configs/scenes.py:tokenizer --workdir=runs/tokenizer
  scar train --config=configs/scenes.py:encoder --workdir=runs/encoder
  scar train --config=configs/scenes.py:edit --workdir=runs/edit \
    --config.tokenizer.artifact=runs/tokenizer \
    --config.encoder.artifact=runs/encoder

Nothing is downloaded and nothing is stored. `control` takes edge, segmentation
and depth maps with a text, `class` the same maps with a class: the colour of
all objects, which no map shows. Needs two CPU cores.
"""

from configs import common
from scar_jax.data.sources.scenes import COLOURS, NUM_CLASSES

KINDS = {
  'tokenizer': 'image',
  'encoder': 'image',
  'edit': 'edit',
  'control': 'control',
  'class': 'class',
}

CELLS = {
  f'cell_{row}_{column}': NUM_CLASSES for row in range(4) for column in range(4)
}


def get_config(arg=None):
  config = common.stage_config(
    arg, 'scenes', KINDS, CELLS, steps=3000, classes=len(COLOURS)
  )
  if config.task == 'scar':
    # Where an object goes is all or nothing: guidance would draw it at every
    # place that the text makes a little likelier.
    config.prefix.places = 'sincos'
    config.sample.guidance = 1.0
    if config.order.name == 'scale':
      # That of the model in README's table; no other was tried.
      config.model.token_noise = 0.25
  return config
