"""What config files share: arguments, defaults of a task, smoke sizes.

In: the text after the colon of `--config=FILE:ARG`. Out: `ConfigDict`s. The
argument is words and assignments: `edit,smoke,size=L`; a bare word is a variant
or a switch.
"""

from typing import Any

from ml_collections import ConfigDict

from scar_jax.config import default_config
from scar_jax.config_values import nearest, read_value


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


STAGES = ('tokenizer', 'encoder', 'edit', 'control')


def stage_config(
  arg: str | None,
  source: str,
  kinds: dict[str, str],
  labels: dict[str, int],
  res: int = 32,
  patch: int = 4,
) -> ConfigDict:
  """The three stages of a small embedded data set.

  Words of `arg`: a stage; `smoke` and `full`; `order=`, `size=`, `res=`;
  `patch=` pixels of a token; `no_source` and `no_text` take that condition
  away.

  Args:
    arg: see `parse_arg`.
    source: name of the data source.
    kinds: stage -> kind of its records.
    labels: what the encoder learns to tell -> number of classes.
    res: pixels of a picture.
    patch: pixels of a token.
  """
  given = parse_arg(
    arg,
    STAGES,
    smoke=False,
    full=False,
    no_source=False,
    no_text=False,
    order='raster',
    size='',
    res=res,
    patch=patch,
  )
  stage = given.variant
  data = dict(
    source=source,
    kind=kinds[stage],
    batch=32 if stage == 'tokenizer' else 64,
    image_size=given.res,
  )
  if stage == 'tokenizer':
    config = _tokenizer(data, given)
  elif stage == 'encoder':
    config = _encoder(data, given, labels)
  else:
    config = _scar(data, given)
  if given.full:
    config.train.steps *= 10
    config.train.save_every *= 4
  if given.smoke:
    smoke(config)
  return config


def _tokenizer(data: dict[str, Any], given: ConfigDict) -> ConfigDict:
  return task_config(
    'tokenizer',
    data=data,
    model=dict(size=given.size or 'tiny', patch=given.patch),
    # Latents first settle unquantised; the codes then start among them.
    loss=dict(vq_start=80, kmeans_iters=10, dead_after=30),
    optim=dict(
      lr=4e-3, schedule='cosine', warmup_steps=20, end_scale=0.02,
      weight_decay=0.0,
    ),
    train=dict(steps=700, ema=0.99, log_every=25, save_every=350),
  )  # fmt: skip


def _encoder(
  data: dict[str, Any], given: ConfigDict, labels: dict[str, int]
) -> ConfigDict:
  return task_config(
    'encoder',
    data=data,
    # It sees 8 x 8 patches whatever the size of the picture.
    model=dict(size=given.size or 'tiny', image_size=32),
    loss=dict(labels=tuple(labels.items())),
    optim=dict(
      lr=1e-3, schedule='cosine', warmup_steps=50, end_scale=0.05,
    ),
    train=dict(steps=400, ema=0.99, log_every=25, save_every=200),
  )  # fmt: skip


def _scar(data: dict[str, Any], given: ConfigDict) -> ConfigDict:
  config = task_config(
    'scar',
    data=data,
    model=dict(
      size=given.size or 'tiny', cond_dropout='joint', resid_dropout=0.0,
      ffn_dropout=0.0, token_dropout=0.0,
    ),
    order=dict(name=given.order),
    prefix=dict(k=2),
    # From scratch and this small, a moving target would collapse.
    align=dict(stop_target_grad=True),
    text=dict(length=40),
    optim=dict(
      lr=1e-3, schedule='cosine', warmup_steps=100, end_scale=0.02,
    ),
    train=dict(
      steps=2400, ema=0.995, log_every=25, save_every=400, picture_every=400,
    ),
    sample=dict(temperature=0.0),
  )  # fmt: skip
  if given.no_source:
    config.prefix.compress = 'off'
    config.model.cond_dropout = 'text'
  if given.no_text:
    config.text.kind = 'none'
  return config
