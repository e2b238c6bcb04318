"""Instruction edits at 512 pixels, the paper's recipe (method 8, 8.3).

  scar plan --config=configs/edit512.py --topology=v5e:4x4 --mesh=fsdp:16
  scar train --config=configs/edit512.py --workdir=runs/edit512 \
    --config.data.path=seed_data_edit --config.init_from=artifacts/t2i_xl \
    --config.tokenizer.artifact=artifacts/vq16 \
    --config.encoder.artifact=artifacts/dinov2 \
    --config.text.artifact=artifacts/flan_t5_xl --config.text.vocab=spiece.model

Data, by the first word after the colon: `unsplash`, the Unsplash part of
SEED-Data-Edit, unpacked or in its archives; or `ip2p_magicbrush`, the folders
`instructpix2pix` (timbrooks/instructpix2pix-clip-filtered, 313,010 pairs, 130
GB) and `magicbrush` (osunlp/MagicBrush, 8,807 edits) of parquet shards below
`data.path`, nine of ten pairs from the first. With `data.cache=DIR` shards are
unpacked once, which takes their size again and reads much faster. A cache of
`scar tokenize` takes 1.6 MB a pair, with --features --dtype=bfloat16 12.6 MB.

256 prefix positions of DINOv2-B at 448 pixels, 120 of flan-T5-XL, 1024 target
tokens. More words after the colon: `size=` of the model (XL, 3B, 7B, ...; d30
and the like with `order=scale`), `order=raster|scale|random`, `k=` of the
prefix (1, 2 or 4: 1, 4 or 16 times compressed), `features=last` for a
compressor a 16th as large; `smoke` is the same shape in small. `scar plan`
needs none of the artifacts: it takes the sizes that are named here.
"""

from configs import common
from scar_jax.models.decoder import decoder_size

# Pairs of an epoch; of the Unsplash part, about.
_EPOCH = {'unsplash': 80_000, 'ip2p_magicbrush': 313_010 + 8_807}
_MIXTURE = (
  {'source': 'parquet', 'path': 'instructpix2pix', 'weight': 0.9},
  {'source': 'parquet', 'path': 'magicbrush', 'weight': 0.1},
)


def get_config(arg=None):
  given = common.parse_arg(
    arg,
    tuple(_EPOCH),
    size='',
    order='raster',
    k=2,
    features='last4',
    smoke=False,
  )
  scale = given.order == 'scale'
  size = given.size or ('d30' if scale else 'XL')
  config = common.task_config(
    'scar',
    data=dict(
      source='seed_edit', kind='edit', batch=64, image_size=512,
      mixture=() if given.variant == 'unsplash' else _MIXTURE,
    ),
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
      size='flan-t5-xl', dtype='bfloat16',
    ),
    **common.paper_networks(512, scale, given.features),
    loss=dict(chunk=256),
    optim=dict(lr=1e-4, weight_decay=0.05, clip=2.0 if scale else 1.0),
    train=dict(
      steps=2 * _EPOCH[given.variant] // 64, ema=0.0, log_every=50,
      save_every=1000, keep=3, tpu_options=common.TPU_OPTIONS,
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
    shrink(config)
  return config


def shrink(config):
  """The same networks with few channels, at 32 pixels."""
  common.smoke(config)
  common.smoke_networks(config)
  config.data.image_size = 32
  config.model.update(dict(size='tiny', width=64, layers=2, heads=2))
