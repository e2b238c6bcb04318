"""Config sections as frozen dataclasses, and what turns a ConfigDict into them.

In: the `ConfigDict` of a config file with command-line text laid over it. Out:
a frozen `Config` whose every field has been judged (`check`): known name, right
type, in range, possible together with the others. Below this file nobody sees
a ConfigDict. Reading and judging single values is `config_values.py`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from scar_jax.config_values import (
  choice,
  nearest_multiples,
  number,
  read_section,
  unknown_name,
)
from scar_jax.data.aspects import check_aspects
from scar_jax.data.geometry import FITS
from scar_jax.filters import RAMPS, SCHEDULES
from scar_jax.train.tasks import task_module


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
  source: str  # as `data.source`
  path: str = ''  # below `data.path`, or absolute
  weight: float = number(1.0, 0.0)  # share of the stream, up to a factor
  kind: str = ''  # '' is `data.kind`
  split: str = ''  # '' is `data.split`
  columns: tuple[tuple[str, str], ...] = ()  # () is `data.columns`


@dataclasses.dataclass(frozen=True)
class DataConfig:
  source: str = 'openmoji'  # name of a module in scar_jax/data/sources
  kind: str = 'edit'  # what a record is, in the words of the source
  path: str = ''  # file or folder of the source; '' is its embedded data
  # Maps that become the condition, see data.controls.KINDS; one is drawn for
  # each record. () keeps what the source gives.
  control: tuple[str, ...] = ()
  control_path: str = ''  # folder of maps, one folder in it for each kind
  split: str = 'train'  # which part of the source to train on
  mixture: tuple[MixtureConfig, ...] = ()  # several sources in place of one
  columns: tuple[tuple[str, str], ...] = ()  # role=name of a field, see fields
  images: str = ''  # folder or archive of pictures; '' is beside the file
  subset: str = ''  # multigen: first folder of the pictures used; '' is all
  fractions: tuple[float, ...] = (0.9, 0.05, 0.05)  # ip2p: train, val, test
  cache: str = ''  # parquet: folder for unpacked row groups; '' is none
  batch: int = number(64, 1)  # global batch: images per optimiser step
  image_size: int = number(32, 1)  # pixels, square
  aspects: tuple[str, ...] = ()  # width:height of batches; () is square crops
  aspect_step: int = number(32, 1)  # pixels, of which their sides are multiples
  fit: str = choice('crop', *FITS)
  crop_ratio: float = number(1.0, 1.0)  # resized to so much more, then cropped
  flip: float = number(0.0, 0.0, 1.0)  # chance that a record is mirrored
  augment: bool = True  # random placement, mirroring, recolouring
  workers: int = number(0, 0)  # loader processes per host; 0 is in-process
  strict: bool = False  # stop at the first bad record
  max_bad_share: float = number(0.05, 0.0, 1.0)  # stop above this share


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  replica: int = number(1, -1)  # copies across slices
  data: int = number(-1, -1)  # batch only; -1 is the rest of the devices
  fsdp: int = number(1, -1)  # batch, parameters and optimiser state
  tensor: int = number(1, -1)  # heads, MLP width, vocabulary


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  name: str = choice('adamw', 'adamw', 'muon')  # muon: of matrices; else adamw
  lr: float = number(1e-4, 0.0)  # peak learning rate
  schedule: str = choice('constant', 'constant', 'cosine', 'lin0')
  warmup_steps: int = number(0, 0)  # linear, from `warmup_start` of lr
  warmup_start: float = number(0.005, 0.0, 1.0)  # share of lr at step 0
  end_scale: float = number(0.0, 0.0, 1.0)  # share of lr at the last step
  b1: float = number(0.9, 0.0, 1.0)
  b2: float = number(0.95, 0.0, 1.0)
  eps: float = number(1e-8, 0.0)
  weight_decay: float = number(0.05, 0.0)  # on tensors of 2 or more dims
  no_decay: str = choice('ndim', 'ndim', 'var')  # 'var' adds VAR's names
  clip: float = number(1.0, 0.0)  # global gradient norm; 0 is off
  group_lr: tuple[tuple[str, float], ...] = ()  # peak lr of other groups
  freeze: tuple[str, ...] = ()  # path parts of parameters never updated


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int = number(1000, 1)  # optimiser steps
  accum: int = number(1, 1)  # microbatches per step
  ema: float = number(0.0, 0.0, 1.0)  # decay per step; 0 is off
  log_every: int = number(20, 1)  # steps
  save_every: int = number(200, 1)  # steps
  keep: int = number(2, 1)  # newest checkpoints kept, besides the best
  best: str = 'loss'  # metric whose lowest logged mean is kept as best
  picture_every: int = number(0, 0)  # steps; 0 is off
  max_bad_steps: int = number(3, 1)  # non-finite steps in a row that stop
  resume: bool = True  # go on from the newest whole checkpoint, if any
  require_resume: bool = False  # no whole checkpoint is an error
  log_compiles: bool = True  # count compilations into summary.json
  tpu_options: tuple[tuple[str, str], ...] = ()  # XLA's, of the step on TPUs


@dataclasses.dataclass(frozen=True)
class ArtifactRef:
  artifact: str = ''  # artifact directory, or the work directory of its run
  # Of the network where `scar plan` has no artifact: `B,image_size=448`.
  size: str = ''


@dataclasses.dataclass(frozen=True)
class EncoderRef(ArtifactRef):
  dtype: str = choice('', '', 'float32', 'bfloat16')  # '': the artifact's


@dataclasses.dataclass(frozen=True)
class OrderConfig:
  name: str = choice('raster', 'raster', 'scale', 'random')
  num_sets: int = number(8, 1)  # random order: sets of a sampling run
  train_sets: tuple[int, ...] = ()  # one drawn per step; () is num_sets


@dataclasses.dataclass(frozen=True)
class PrefixSection:
  compress: str = choice(
    'full',
    *('full', 'conv_resize', 'conv', 'resize', 'unshuffle'),
    *('none', 'vq', 'vq_pool', 'off'),
  )
  k: int = choice(2, 1, 2, 4)  # linear compression of the feature grid
  norm: str = 'none'  # of the compressed features
  places: str = choice('none', 'none', 'sincos')  # added to the prefix
  mask: str = choice('bidirectional', 'bidirectional', 'causal')
  rope: str = choice('offset_p', 'offset_p', 'offset_g', 'aligned', 'none')
  ada: str = choice('class', 'class', 'null')  # scale order: who modulates it
  inject: str = choice('prefill', 'prefill', 'fusion', 'cross')  # baselines


@dataclasses.dataclass(frozen=True)
class LossConfig:
  pres: float = number(1.0, 0.0)  # weight of preservation
  align: float = number(0.5, 0.0)  # weight of alignment
  chunk: int = number(0, 0)  # positions whose logits exist at once; 0 is all


@dataclasses.dataclass(frozen=True)
class AlignConfig:
  stop_target_grad: bool = False  # as the official code; True from scratch
  hidden: str = choice('post_norm', 'post_norm', 'pre_norm')


@dataclasses.dataclass(frozen=True)
class TextConfig:
  kind: str = choice('byte', 'byte', 't5', 'label', 'none')
  artifact: str = ''  # frozen T5 encoder
  dtype: str = choice('', '', 'float32', 'bfloat16')  # of the frozen T5
  size: str = ''  # of that T5 where `scar plan` has no artifact
  vocab: str = ''  # SentencePiece file of a T5
  length: int = number(40, 2)  # tokens, the end mark included
  pad: str = choice('right', 'right', 'left')
  clean: bool = False  # LlamaGen's caption cleaning
  mask_pad: bool = True  # padding is hidden from every query
  null: str = choice('learned', 'learned', 'fixed')  # null text condition
  classes: int = number(1000, 1)  # of kind 'label'
  rope: str = choice('identity', 'identity', 'zero')
  width: int = number(128, 1)  # byte encoder
  layers: int = number(2, 1)  # byte encoder
  heads: int = number(4, 1)  # byte encoder
  ngrams: tuple[int, ...] = ()  # byte encoder: lengths with own embeddings


@dataclasses.dataclass(frozen=True)
class ScarModel:
  size: str = 'tiny'  # see models.decoder.decoder_size
  width: int = number(0, 0)  # 0: by size
  layers: int = number(0, 0)  # 0: by size
  heads: int = number(0, 0)  # 0: by size
  resid_dropout: float = number(0.1, 0.0, 1.0)
  ffn_dropout: float = number(0.1, 0.0, 1.0)
  attn_dropout: float = number(0.0, 0.0, 1.0)
  drop_path: float = number(0.0, 0.0, 1.0)
  token_dropout: float = number(0.1, 0.0, 1.0)
  token_dropout_scope: str = choice('text', 'text', 'all')
  token_noise: float = number(0.0, 0.0, 1.0)  # most inputs replaced
  context_dropout: float = number(0.0, 0.0, 1.0)  # all inputs replaced
  text_dropout: float = number(0.1, 0.0, 1.0)  # null text, for guidance
  prefix_dropout: float = number(0.1, 0.0, 1.0)  # null prefix, joint scheme
  cond_dropout: str = choice('text', 'text', 'joint')
  remat: str = 'none'  # rematerialisation policy of the layers
  scan: bool = True  # layers stacked and scanned
  attention: str = 'auto'  # backend, see models.attention
  shard_length: bool = False  # the residual stream over mesh.tensor
  dtype: str = 'float32'  # of matrix products
  places: str = choice('normal', 'normal', 'sincos', 'rotary')  # scale order
  codebook_init: bool = False  # tables start from the tokenizer's codes


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  temperature: float = number(1.0, 0.0)  # 0 is greedy
  top_k: int = number(0, 0)  # 0 is all
  top_p: float = number(1.0, 0.0, 1.0)
  guidance: float = number(1.0, 0.0)  # on text; 1 is off
  image_guidance: float = number(1.0, 0.0)  # on the condition; 1 is off
  ramp: str = choice('', '', *RAMPS)  # of guidance over sets; '': by order
  smooth: bool = False  # scale order: mix codes in place of drawing one
  mean_code: bool = False  # other orders: decode the mean of the codes
  num_sets: int = number(0, 0)  # steps of the random order; 0: as trained
  schedule: str = choice('random', *SCHEDULES)  # random order
  schedule_noise: float = number(1.0, 0.0)  # Gumbel, of 'confidence'
  batch: int = number(16, 1)  # images made together


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  splits: tuple[str, ...] = ()  # of the source; () is its held-out ones
  limit: int = number(0, 0)  # records per split; 0 is all


@dataclasses.dataclass(frozen=True)
class Config:
  """One run. Sections that the task does not have are None."""

  task: str
  seed: int
  init_from: str  # artifact or work directory whose parameters start this run
  data: DataConfig
  mesh: MeshConfig
  optim: OptimConfig
  train: TrainConfig
  model: Any
  loss: Any
  order: OrderConfig | None = None
  prefix: PrefixSection | None = None
  align: AlignConfig | None = None
  text: TextConfig | None = None
  tokenizer: ArtifactRef | None = None
  encoder: EncoderRef | None = None
  sample: SampleConfig | None = None
  eval: EvalConfig | None = None


COMMON_SECTIONS: dict[str, type] = {
  'data': DataConfig,
  'mesh': MeshConfig,
  'optim': OptimConfig,
  'train': TrainConfig,
}
# Sections of task 'scar'; train/tasks/scar.py exports them as its SECTIONS.
SCAR_SECTIONS: dict[str, type] = {
  'model': ScarModel,
  'loss': LossConfig,
  'order': OrderConfig,
  'prefix': PrefixSection,
  'align': AlignConfig,
  'text': TextConfig,
  'tokenizer': ArtifactRef,
  'encoder': EncoderRef,
  'sample': SampleConfig,
  'eval': EvalConfig,
}
_SCALARS = {'task': str, 'seed': int, 'init_from': str}


def sections(task: str) -> dict[str, type]:
  """Section name -> dataclass, of one task."""
  return COMMON_SECTIONS | task_module(task).SECTIONS


def default_config(task: str) -> ConfigDict:
  """A full ConfigDict of a task, every field at its default."""
  values = {name: cls() for name, cls in sections(task).items()}
  return to_config_dict(Config(task=task, seed=0, init_from='', **values))


def to_dict(config: Any) -> dict[str, Any]:
  """Plain nested dict of a Config; absent sections are left out."""
  return {k: v for k, v in dataclasses.asdict(config).items() if v is not None}


def to_config_dict(config: Config) -> ConfigDict:
  """The ConfigDict that `check` turns back into `config`."""
  return ConfigDict(to_dict(config), convert_dict=True)


def to_json(config: Any) -> str:
  """Stable text of a Config or a config dataclass."""
  return json.dumps(to_dict(config), indent=1, sort_keys=True) + '\n'


def check(raw: Mapping[str, Any] | ConfigDict) -> Config:
  """Judges every field and freezes the config.

  Args:
    raw: nested mapping; absent fields take their default, values may be text.

  Raises:
    ValueError: names the field, the value, what is accepted.
  """
  values = raw.to_dict() if isinstance(raw, ConfigDict) else dict(raw)
  if 'task' not in values:
    raise ValueError('task is missing; accepted: tokenizer, encoder, scar')
  schema = sections(values['task'])
  for name in values:
    if name not in schema and name not in _SCALARS:
      raise unknown_name(name, [*_SCALARS, *schema])
  scalars = read_section(
    '',
    _SCALARS,
    {k: v for k, v in values.items() if k in _SCALARS},
    {'seed': 0, 'init_from': ''},
  )
  built = {
    name: read_section(name, cls, values.get(name, {}))
    for name, cls in schema.items()
  }
  config = Config(**scalars, **built)
  check_aspects(config)
  return config


def batch_per_device(
  batch: int, devices: int, accum: int = 1, hosts: int = 1
) -> int:
  """Rows of one microbatch on one device.

  Args:
    batch: global batch.
    devices: over which the batch is split (`sharding.batch_ways`).
    accum: microbatches per step.
    hosts: processes that share the devices.

  Raises:
    ValueError: something does not divide; names the nearest numbers that do.
  """
  if devices % hosts:
    raise ValueError(
      f'{devices} devices are not a multiple of {hosts} hosts; accepted: the '
      'same number of devices on each host'
    )
  where = '(set --config.data.batch or --config.train.accum)'
  split = devices * accum
  if batch % split:
    valid = nearest_multiples(batch, split)
    if accum == 1:
      what = f'is not a multiple of the {devices} devices that share it'
    else:
      what = (
        f'cannot be split over {devices} devices x train.accum={accum}: '
        f'{batch}/({devices}*{accum}) is not whole'
      )
    raise ValueError(f'data.batch={batch} {what} ({valid} would be) {where}')
  return batch // split


def check_tensor_axis(tensor: int, heads: int) -> None:
  """Refuses a tensor axis that would cut a head.

  Raises:
    ValueError: lists the sizes that divide the heads.
  """
  if heads % tensor:
    good = ', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    raise ValueError(
      f'mesh.tensor={tensor} does not divide the {heads} heads of the model; '
      f'accepted: {good} (set --config.mesh.tensor)'
    )


def replace(section: Any, **changes: Any) -> Any:
  """A copy of a section with the changes that are not None."""
  given = {k: v for k, v in changes.items() if v is not None}
  return dataclasses.replace(section, **given)


def differences(
  a: Mapping[str, Any], b: Mapping[str, Any], path: str = ''
) -> list[str]:
  """`name: in a -> in b` for every field in which two config dicts differ."""
  found = []
  for key in sorted({*a, *b}):
    name = f'{path}{key}'
    left, right = a.get(key, '(absent)'), b.get(key, '(absent)')
    if isinstance(left, Mapping) and isinstance(right, Mapping):
      found += differences(left, right, f'{name}.')
    elif _plain(left) != _plain(right):
      found.append(f'{name}: {left!r} -> {right!r}')
  return found


def _plain(value: Any) -> Any:
  """JSON turns tuples into lists; they are equal here."""
  return json.loads(json.dumps(value, default=str))
