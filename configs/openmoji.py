"""OpenMoji: real drawings; edits by instruction, and colouring of line art.

Command, for each stage in turn (`bash launch/quickstart.sh` runs them all):

  scar train --config=configs/openmoji.py:tokenizer --workdir=runs/tokenizer
  scar train --config=configs/openmoji.py:encoder --workdir=runs/encoder
  scar train --config=configs/openmoji.py:edit --workdir=runs/edit \
    --config.tokenizer.artifact=runs/tokenizer \
    --config.encoder.artifact=runs/encoder

Words after the colon: `tokenizer`, `encoder`, `edit` or `control`; `smoke` (20
steps), `full` (ten times as long); `order=raster`; `size=` of the model;
`res=` pixels; `no_source`, `no_text` (ablations). Needs two CPU cores and the
extra `data`.
"""

from configs import common
from scar_jax.data.sources.openmoji_pairs import label_sizes

KINDS = {
  'tokenizer': 'image',
  'encoder': 'image',
  'edit': 'both',
  'control': 'control',
}


def get_config(arg=None):
  return common.stage_config(arg, 'openmoji', KINDS, label_sizes())
