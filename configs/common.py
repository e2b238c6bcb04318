"""What config files share: arguments, defaults of a task, smoke sizes.

In: the text after the colon of `--config=FILE:ARG`. Out: `ConfigDict`s. The
argument is words and assignments: `edit,smoke,size=L`; a bare word is a variant
or a switch.
"""

from typing import Any

from ml_collections import ConfigDict

from scar_jax.config import default_config
from scar_jax.config_values import nearest, read_value
from scar_jax.models.decoder import decoder_size

# Reduce-scatters of gradients run beside products, which the compiler leaves
# off by itself. The fusions need more on-chip memory than its default, 16 MiB
# of 128.
TPU_OPTIONS = (
  ('xla_enable_async_reduce_scatter_fusion', 'true'),
  ('xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter', 'true'),
  ('xla_tpu_scoped_vmem_limit_kib', '17408'),
)

# Of the small recipes. More of it costs more of what should stay as it is.
_GUIDANCE = {'raster': 1.25, 'random': 1.5, 'scale': 2.0}


def parse_arg(
  arg: str | None, variants: tuple[str, ...], **defaults: Any
) -> ConfigDict:
  """Reads the argument of a config file.

  Args:
    arg: `variant,switch,name=value`; None is the first variant.
    variants: accepted bare words of which one is chosen.
    **defaults: names and their defaults; the type of a default is that of the
      value; False is a switch, which a bare word turns on.

  Returns:
    The values, with `variant`.

  Raises:
    ValueError: an unknown word or name, a value of another type.
  """
  values = ConfigDict(defaults)
  values.variant = ''
  for part in filter(None, (arg or '').split(',')):
    name, sep, text = (piece.strip() for piece in part.partition('='))
    if name not in defaults and (sep or name not in variants):
      known = (*variants, *defaults)
      raise ValueError(
        f'config argument {part!r} is unknown.{nearest(name, known)} '
        f'Accepted: {", ".join(variants)}; {", ".join(defaults)}'
      )
    if name in variants and not sep:
      if values.variant:
        raise ValueError(
          f'config argument {arg!r} names two variants, {values.variant} and '
          f'{name}; accepted: one of {", ".join(variants)}'
        )
      values.variant = name
    elif not sep and not isinstance(defaults[name], bool):
      raise ValueError(f'config argument {name!r} needs a value: {name}=...')
    else:
      kind = type(defaults[name])
      values[name] = read_value(f'config argument {name}', kind, text or 'true')
  values.variant = values.variant or variants[0]
  return values


def task_config(task: str, **sections: dict[str, Any]) -> ConfigDict:
  """Defaults of a task with some fields changed.

  Args:
    task: 'tokenizer', 'encoder' or 'scar'.
    **sections: section -> fields; or a scalar such as `seed`.
  """
  config = default_config(task)
  for name, value in sections.items():
    if isinstance(value, dict):
      config[name].update(value)
    else:
      config[name] = value
  return config


def smoke(config: ConfigDict, steps: int = 20) -> ConfigDict:
  """The same recipe in well under a minute: few steps, small batch."""
  config.train.update(
    dict(steps=steps, log_every=5, save_every=steps, picture_every=0)
  )
  config.data.batch = min(config.data.batch, 8)
  config.optim.warmup_steps = min(config.optim.warmup_steps, steps // 4)
  return config


def stage_words(
  arg: str | None, kinds: dict[str, str], res: int = 32, patch: int = 4
) -> ConfigDict:
  """Reads the argument of `stage_config`."""
  return parse_arg(
    arg,
    tuple(kinds),
    smoke=False,
    full=False,
    no_source=False,
    no_text=False,
    order='raster',
    size='',
    res=res,
    patch=patch,
  )


def stage_config(
  arg: str | None,
  source: str,
  kinds: dict[str, str],
  labels: dict[str, int],
  res: int = 32,
  patch: int = 4,
  text: int = 40,
  steps: int = 1400,
  batch: int = 16,
  classes: int = 0,
) -> ConfigDict:
  """The stages of a small embedded data set.

  Words of `arg`: a stage, one of `kinds`; `smoke` and `full`; `order=`,
  `size=`, `res=`; `patch=` pixels of a token; `no_source` and `no_text` take
  that condition away.

  Args:
    arg: see `parse_arg`.
    source: name of the data source.
    kinds: stage -> kind of its records.
    labels: what the encoder learns to tell -> number of classes.
    res: pixels of a picture.
    patch: pixels of a token.
    text: bytes of the longest instruction, its end mark included.
    steps: of SCAR.
    batch: of SCAR.
    classes: of the stage 'class', whose text is a class.
  """
  given = stage_words(arg, kinds, res, patch)
  stage = given.variant
  data = dict(
    source=source,
    kind=kinds[stage],
    batch=32 if stage in ('tokenizer', 'encoder') else batch,
    image_size=given.res,
  )
  if stage == 'tokenizer':
    config = _tokenizer(data, given)
  elif stage == 'encoder':
    config = _encoder(data, given, labels)
  else:
    config = _scar(data, given)
    config.text.length = text
    config.train.steps = steps
    if stage == 'class' and not given.no_text:
      config.text.update(dict(kind='label', classes=classes))
  if given.full:
    config.train.steps *= 3
    config.train.save_every *= 3
  if given.smoke:
    smoke(config)
  return config


def _tokenizer(data: dict[str, Any], given: ConfigDict) -> ConfigDict:
  config = task_config(
    'tokenizer',
    data=data,
    model=dict(size=given.size or 'tiny', patch=given.patch),
    # The first batches show what pixels there are; the codes start among them.
    loss=dict(vq_start=20, kmeans_iters=20, dead_after=60),
    # The linear encoder keeps distances: latents are pixels, and stay so.
    optim=dict(
      lr=3e-3, schedule='cosine', warmup_steps=20, end_scale=0.02,
      weight_decay=0.0, freeze=('vq/encoder', 'vq/quant_conv'),
    ),
    # A long average would lag behind codes that moved.
    train=dict(steps=400, ema=0.95, log_every=25, save_every=200),
  )  # fmt: skip
  if given.order == 'scale':
    # Two scales of one size: codes of what is seen, then of what is left over.
    # With coarser ones before, down to the mean of the picture, what a code of
    # the last looks like hangs on all of them, and one that is wrong tints the
    # whole picture. Few codes: what is left over is hard enough to tell.
    side = given.res // given.patch
    config.model.update(dict(patch_nums=(side, side), codes=512))
    config.train.update(dict(steps=200, save_every=100))
  return config


def _encoder(
  data: dict[str, Any], given: ConfigDict, labels: dict[str, int]
) -> ConfigDict:
  return task_config(
    'encoder',
    data=data,
    # The grid of features is that of the tokens, so that every position of
    # the prefix stands for the same whole number of tokens.
    model=dict(size=given.size or 'tiny', patch=given.patch),
    loss=dict(labels=tuple(labels.items())),
    optim=dict(
      lr=1.5e-3, schedule='cosine', warmup_steps=30, end_scale=0.05,
    ),
    train=dict(steps=220, ema=0.98, log_every=20, save_every=110),
  )  # fmt: skip


def _scar(data: dict[str, Any], given: ConfigDict) -> ConfigDict:
  config = task_config(
    'scar',
    data=data,
    model=dict(
      size=given.size or 'tiny', scan=False, codebook_init=True,
      token_noise=1.0, context_dropout=0.3, resid_dropout=0.0, ffn_dropout=0.0,
      token_dropout=0.0,
    ),
    order=dict(name=given.order),
    # Words from the first step on.
    text=dict(ngrams=(4, 8)),
    # Unnormalised, projection and states chase each other's scale upwards.
    prefix=dict(k=2, norm='layernorm', rope='aligned'),
    # From scratch and this small, a moving target would collapse.
    align=dict(stop_target_grad=True),
    optim=dict(
      name='muon', lr=3e-3, schedule='cosine', warmup_steps=60, end_scale=0.02,
    ),
    train=dict(
      ema=0.99, log_every=25, save_every=400, picture_every=400,
    ),
    sample=dict(temperature=0.0, guidance=_GUIDANCE.get(given.order, 1.0)),
  )  # fmt: skip
  if given.order == 'scale':
    # Every wrong code of an early scale spoils the whole picture.
    config.model.update(dict(context_dropout=0.0, places='rotary'))
    # The first of two scales, which VAR's ramp does not guide, is the picture.
    config.sample.ramp = 'constant'
  if given.order == 'random':
    # Which tokens it sees varies by itself; what they say may be trusted more.
    config.model.update(dict(token_noise=0.5, context_dropout=0.1))
  if given.no_source:
    config.prefix.compress = 'off'
  if given.no_text:
    config.text.kind = 'none'
    config.sample.guidance = 1.0
  return config


def paper_model(size: str) -> dict[str, Any]:
  """Section `model` of a published size, with the dropouts it came with."""
  decoder = decoder_size(size)
  return dict(
    size=size,
    resid_dropout=decoder.resid_dropout,
    ffn_dropout=decoder.ffn_dropout,
    drop_path=decoder.drop_path,
    token_dropout=0.0 if decoder.block == 'adaln' else 0.1,
    remat='full',
    dtype='bfloat16',
  )


def paper_networks(pixels: int, scale: bool, features: str = 'last4') -> Any:
  """Sections of the frozen networks, for `scar plan` without artifacts.

  Args:
    pixels: of a picture, 256 or 512; DINOv2 sees 7/8 of them.
    scale: the multi-scale tokenizer.
    features: of the encoder.
  """
  return dict(
    tokenizer=dict(size=f'var{pixels}' if scale else 'vq16'),
    # Frozen, so bfloat16 costs nothing that training could not see.
    encoder=dict(
      size=f'B,image_size={pixels * 7 // 8},features={features}',
      dtype='bfloat16',
    ),
  )


def smoke_networks(config: ConfigDict) -> None:
  """The same networks with few channels, for pictures of 32 pixels."""
  scale = config.order.name == 'scale'
  config.tokenizer.size = 'tiny,patch_nums=1,2,3,4,6,8' if scale else 'tiny'
  config.encoder.update(dict(size='tiny,depth=4,features=last4', dtype=''))
  if config.text.kind == 't5':
    config.text.update(dict(length=8, size='flan-t5-small,layers=1', dtype=''))


def smoke_model(config: ConfigDict) -> ConfigDict:
  """A recipe of a large model in small: it runs on a laptop, in 32 pixels."""
  smoke_networks(config)
  config.model.update(dict(size='tiny', dtype='float32', remat='none'))
  config.data.update(dict(image_size=32, workers=0))
  config.text.rope = 'identity'  # from scratch
  config.sample.top_k = 0
  return smoke(config)
