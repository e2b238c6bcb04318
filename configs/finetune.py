"""Fine-tuning a converted checkpoint on your own pictures: a JSONL file.

  scar train --config=configs/finetune.py:edit --workdir=runs/mine \
    --config.data.path=pairs.jsonl --config.init_from=artifacts/t2i_xl \
    --config.tokenizer.artifact=artifacts/vq16 \
    --config.encoder.artifact=artifacts/dinov2 \
    --config.text.artifact=artifacts/flan_t5_xl --config.text.vocab=spiece.model

`edit` takes lines of `source`, `target`, `instruction`; `control` lines of
`control`, `target` and, if there is one, `caption`. With `control,draw=canny`
(or `lineart`, or several with +) a line needs the target alone: its map is
drawn while training. A few hundred lines are a start; at 512 pixels a pair is
1.6 MB in a cache of `scar tokenize`.

The networks are those of `edit512.py` and `size=`, `order=`, `k=`, `features=`
and `smoke` the same words. What differs: a fifth of the learning rate, and
2,000 steps of 16 that end near zero. What the checkpoint lacks, such as the
prefix, starts afresh and is named. README, "Fine-tuning on your own pictures",
has the memory it takes and what may be frozen.
"""

from configs import common, edit512


def get_config(arg=None):
  given = common.parse_arg(
    arg,
    ('edit', 'control'),
    draw='',
    size='XL',
    order='raster',
    k=2,
    features='last4',
    smoke=False,
  )
  words = [f'{n}={given[n]}' for n in ('size', 'order', 'k', 'features')]
  config = edit512.get_config(','.join(words))
  kind = given.variant
  if given.draw:
    if kind != 'control':
      raise ValueError(
        f'draw={given.draw} with {kind}, whose condition is the source; '
        'accepted: control,draw='
      )
    kind = 'image'
    config.data.control = tuple(given.draw.split('+'))
  config.data.update(dict(source='jsonl', kind=kind, batch=16))
  config.optim.update(
    dict(lr=2e-5, schedule='cosine', warmup_steps=100, end_scale=0.02)
  )
  config.train.update(dict(steps=2000, log_every=10, save_every=500, keep=2))
  if given.smoke:
    edit512.shrink(config)
  return config
