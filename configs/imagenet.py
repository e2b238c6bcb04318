"""ImageNet-256 from a class and a control map: the paper's C2I experiments.

  scar controls --kind=depth --in=imagenet/train --out=maps/depth \
    --weights=artifacts/depth
  scar train --config=configs/imagenet.py:size=d20,control=depth \
    --workdir=runs/d20_depth --config.data.path=imagenet \
    --config.data.control_path=maps --config.init_from=artifacts/var_d20 \
    --config.tokenizer.artifact=artifacts/var_vqvae \
    --config.encoder.artifact=artifacts/dinov2_b

Words after the colon: `size=L` (LlamaGen, next token) or `size=d16`, `d20`,
`d24`, `d30` (VAR, next scale); `order=random` with a LlamaGen; `control=`
canny, lineart, hed, sketch or depth, or several with +, of which each record
draws one; `source=imagefolder` (a folder for each class), `tfds`, or `scenes`
for a try without data; `smoke`: 20 steps of a tiny model. Canny and line art
are drawn while training, the others come from `scar controls`.

Data: ILSVRC 2012 (150 GB, image-net.org), and a map of each picture for those
that `scar controls` makes. Weights: LlamaGen's `c2i_L_256.pt`
and `vq_ds16_c2i.pt`, or VAR's `var_d20.pth` and `vae_ch160v4096z32.pth`, and
DINOv2 B/14, each through `scar convert` (DINOv2 with --image_size=224
--features=last4). Settings are those of method 8; the paper used 8 GPUs. Its
FID of size=L and d20: canny 2.69 and 1.97, depth 2.50 and 3.29, HED 2.67 and
1.51, sketch 3.04 and 3.39. Not trained here.
"""

from configs import common

IMAGES = 1_281_167  # of the training split
BATCH = 256
EPOCHS = {'raster': 20, 'random': 20, 'scale': 10}


def get_config(arg=None):
  given = common.parse_arg(
    arg,
    ('control',),
    smoke=False,
    size='L',
    order='',
    control='canny',
    source='imagefolder',
  )
  by_size = 'scale' if given.size.startswith('d') else 'raster'
  order = given.order or by_size
  config = common.task_config(
    'scar',
    data=dict(
      source=given.source,
      kind='class' if given.source == 'scenes' else 'image',
      control=tuple(given.control.split('+')),
      batch=BATCH,
      image_size=256,
      # Shorter side to 288, a random crop, never mirrored.
      crop_ratio=1.125,
      workers=16,
    ),
    order=dict(name=order, num_sets=16),
    model=common.paper_model(given.size),
    text=dict(kind='label', classes=1000),
    prefix=dict(k=2),
    **common.paper_networks(256, order == 'scale'),
    optim=dict(lr=1e-4),
    train=dict(
      steps=EPOCHS[order] * IMAGES // BATCH,
      log_every=50,
      save_every=2000,
      picture_every=2000,
      tpu_options=common.TPU_OPTIONS,
    ),
    # The settings of ControlAR.
    sample=dict(guidance=4.0, top_k=2000),
  )
  if order == 'scale':
    config.optim.update(
      dict(schedule='lin0', end_scale=0.1, clip=2.0, no_decay='var')
    )
    # Of CAR and ControlVAR: their strength 4 is our 5, at the last scale.
    config.sample.update(dict(guidance=5.0, top_k=900, top_p=0.95))
  else:
    config.model.token_dropout_scope = 'all'
    config.text.rope = 'zero'  # as LlamaGen was trained
  return common.smoke_model(config) if given.smoke else config
