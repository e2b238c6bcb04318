"""Instruction edits at 512 pixels, the paper's recipe (method 8, 8.3).

  scar plan --config=configs/edit512.py --topology=v5e:4x4 --mesh=fsdp:16
  scar train --config=configs/edit512.py --workdir=runs/edit512 \
    --config.data.path=seed_data_edit --config.init_from=artifacts/t2i_xl \
    --config.tokenizer.artifact=artifacts/vq16 \
    --config.encoder.artifact=artifacts/dinov2 \
    --config.text.artifact=artifacts/flan_t5_xl --config.text.vocab=spiece.model

256 prefix positions of DINOv2-B at 448 pixels, 120 of flan-T5-XL, 1024 target
tokens. Words after the colon: `size=` of the model (XL, 3B, 7B, ...; d30 and
the like with `order=scale`), `order=raster|scale|random`, `k=` of the prefix
(1, 2 or 4: 1, 4 or 16 times compressed), `features=last` for a compressor a
16th as large; `smoke` is the same shape in small. `scar plan` needs none of the
artifacts: it takes the sizes that are named here.
"""

from configs import common
from scar_jax.models.decoder import decoder_size

_EPOCH = 80_000  # pairs of the Unsplash part, about
_VARIANTS = ('edit',)


def get_config(arg=None):
  given = common.parse_arg(
    arg, _VARIANTS, size='', order='raster', k=2, features='last4', smoke=False
  )
  scale = given.order == 'scale'
  size = given.size or ('d30' if scale else 'XL')
  config = common.task_config(
    'scar',
    data=dict(source='seed_edit', kind='edit', batch=64, image_size=512),
    mesh=dict(data=1, fsdp=-1),
    model=dict(
      size=size, dtype='bfloat16', remat='full', text_dropout=0.1,
      token_dropout=0.1,
    ),
    order=dict(name=given.order, num_sets=32),
    prefix=dict(compress='full' if given.k > 1 else 'none', k=given.k),
    # As LlamaGen's caption models, from which training starts.
    text=dict(
      kind='t5', length=120, mask_pad=False, null='fixed', rope='zero',
      size='flan-t5-xl,dtype=bfloat16',
    ),
    tokenizer=dict(size='var512' if scale else 'vq16'),
    encoder=dict(
      size=f'B,image_size=448,features={given.features},dtype=bfloat16'
    ),
    optim=dict(lr=1e-4, weight_decay=0.05, clip=2.0 if scale else 1.0),
    train=dict(
      steps=2 * _EPOCH // 64, ema=0.0, log_every=50, save_every=1000, keep=3
    ),
    sample=dict(guidance=3.0, top_k=1000, batch=64),
  )  # fmt: skip
  if scale:
    # Dropouts and decay of VAR.
    depth = decoder_size(size).layers
    config.model.update(
      dict(resid_dropout=0.0, ffn_dropout=0.0, drop_path=0.1 * depth / 24)
    )
    config.optim.no_decay = 'var'
  if given.smoke:
    _shrink(config, scale)
  return config


def _shrink(config, scale):
  """The same networks with few channels, at 32 pixels."""
  common.smoke(config)
  config.data.image_size = 32
  config.model.update(dict(size='tiny', width=64, layers=2, heads=2))
  config.text.update(dict(length=8, size='flan-t5-small,layers=1'))
  config.tokenizer.size = 'tiny,patch_nums=1,2,3,4,6,8' if scale else 'tiny'
  config.encoder.size = 'tiny,depth=4,features=last4'
