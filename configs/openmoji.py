"""OpenMoji: real drawings; edits by instruction, and colouring of line art.

Command, for each stage in turn (`bash launch/quickstart.sh` runs them all):

  scar train --config=configs/openmoji.py:tokenizer --workdir=runs/tokenizer
  scar train --config=configs/openmoji.py:encoder --workdir=runs/encoder
  scar train --config=configs/openmoji.py:edit --workdir=runs/edit \
    --config.tokenizer.artifact=runs/tokenizer \
    --config.encoder.artifact=runs/encoder

Words after the colon: `tokenizer`, `encoder`, `edit` or `control`; `smoke` (20
steps); `order=scale` (in the tokenizer stage too); `size=` of the model; `res=`
pixels; `no_source`, `no_text` (ablations). Needs two CPU cores and the extra
`data`.

`full` is three times as long, with pictures of 48 pixels, and goes on from a
model by `--config.init_from=`; tokenizer and encoder stay those of 36 pixels,
which know no size. Hours on two cores: `edit,full,res=36` from `runs/edit`,
`edit,full` from that, and `edit,full` once more from that.
"""

from configs import common
from scar_jax.data.sources.openmoji_pairs import label_sizes

KINDS = {
  # All that a target can be: recoloured and grey pictures too.
  'tokenizer': 'image=0.45,tone=0.2,recolor=0.2,background=0.1,gray=0.05',
  'encoder': 'image',
  'edit': 'both',
  'control': 'control',
}


def get_config(arg=None):
  # 12 x 12 tokens of 3 pixels: with 4 pixels a token has to choose between the
  # shape of an outline and the tone beside it. The 6 x 6 prefix positions then
  # cover 2 x 2 tokens each.
  given = common.stage_words(arg, KINDS)
  full = given.full and not given.smoke
  scale = given.order == 'scale'
  config = common.stage_config(
    arg,
    'openmoji',
    KINDS,
    label_sizes(),
    res=48 if full else 36,
    patch=3,
    text=32,
    # All places at once, each by itself: what goes where must be learned
    # better. In the time of 1,600 steps of 16 this gets the loss further down.
    steps=3000 if scale else 1400,
    batch=8 if scale else 16,
  )
  if config.task == 'tokenizer' and not scale:
    # With 1,024 of them, in thin figures one in 25 tones is lost in lines.
    config.model.codes = 2048
  if full and config.task == 'scar':
    # Sure of itself by then, and the noise of drawn codes is what is left.
    config.sample.mean_code = config.order.name != 'scale'
    if config.text.kind != 'none':
      config.sample.guidance = 2.5
  return config
