"""MultiGen-20M at 512 pixels, from a caption and a control map.

  scar train --config=configs/t2i512.py:control=depth --workdir=runs/t2i_depth \
    --config.data.path=multigen --config.init_from=artifacts/t2i_xl \
    --config.tokenizer.artifact=artifacts/vq16_t2i \
    --config.encoder.artifact=artifacts/dinov2_b \
    --config.text.artifact=artifacts/t5 --config.text.vocab=spiece.model

Words after the colon: `control=` depth, hed, canny, lineart or seg: the maps
that come with the data, or with `drawn` canny and line art drawn from the
pictures while training; `order=random` in place of next token; `size=` of a
LlamaGen; `smoke`: 20 steps of a tiny model.

Data: MultiGen-20M (JSON and folders, see the source `multigen`), about 2.8
million pictures with maps and captions; `data.subset=aesthetics_6_plus_0` is
one of its folders. Picture and map at 512 pixels, as `scar tokenize` keeps
them, are 1.6 MB a record. Weights: LlamaGen's `t2i_XL_stage2_512.pt`
and `vq_ds16_t2i.pt`, DINOv2 B/14 and flan-T5-XL, each through `scar convert`
(DINOv2 with --image_size=448 --features=last4). Settings are those of method
8; the paper used 8 GPUs for 4 epochs. Its FID: depth 13.77, HED 8.41, canny
10.82, line art 8.91. Not trained here.
"""

from configs import common

IMAGES = 2_800_000  # about; set train.steps for another subset
BATCH = 64
EPOCHS = 4
CONTROLS = ('depth', 'hed', 'canny', 'lineart', 'seg')


def get_config(arg=None):
  given = common.parse_arg(
    arg,
    ('control',),
    smoke=False,
    drawn=False,
    size='XL',
    order='raster',
    control='depth',
    source='multigen',
  )
  if given.control not in CONTROLS:
    raise ValueError(
      f'control={given.control!r}; accepted: {", ".join(CONTROLS)}'
    )
  config = common.task_config(
    'scar',
    data=dict(
      source=given.source,
      kind=given.control,
      control=(given.control,) if given.drawn else (),
      batch=BATCH,
      image_size=512,
      workers=16,
    ),
    order=dict(name=given.order, num_sets=32),
    model=common.paper_model(given.size),
    text=dict(
      kind='t5', length=120, mask_pad=False, null='fixed', rope='zero',
      size='flan-t5-xl',
      dtype='bfloat16',
    ),
    prefix=dict(k=2),
    **common.paper_networks(512, scale=False),
    loss=dict(chunk=256),
    optim=dict(lr=1e-4),
    train=dict(
      steps=EPOCHS * IMAGES // BATCH,
      log_every=50,
      save_every=2000,
      picture_every=2000,
      tpu_options=common.TPU_OPTIONS,
    ),
    # The settings of ControlAR.
    sample=dict(guidance=4.0, top_k=2000),
  )  # fmt: skip
  return common.smoke_model(config) if given.smoke else config
