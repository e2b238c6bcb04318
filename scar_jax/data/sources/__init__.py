"""Data sources by name.

In: the `data` section of a config and a split. Out: a `records.Source`. A
source is one module of this package with a function `make(data_cfg, split)`;
it is imported only when asked for, so its libraries may be optional.
"""

import dataclasses
import importlib
import os
from typing import Any

from scar_jax.config_values import nearest
from scar_jax.data.controls import Controlled
from scar_jax.data.mixture import Mixture
from scar_jax.data.records import Rows, Source

NAMES = (
  *('openmoji', 'scenes', 'folder', 'jsonl', 'imagefolder', 'tfds'),
  *('parquet', 'webdataset', 'ip2p', 'seed_edit', 'multigen', 'pie', 'cache'),
)


def make_source(data_cfg: Any, split: str | None = None) -> Source:
  """The source that `data_cfg.source` names.

  Args:
    data_cfg: a `config.DataConfig`; its `mixture` goes before its `source`.
    split: which part; None is `data_cfg.split`.

  Raises:
    ValueError: no such source, or the source refuses its settings.
  """
  chosen: str = data_cfg.split if split is None else split
  if data_cfg.mixture:
    return make_mixture(data_cfg, chosen)
  # What follows a colon is for the source: tfds:imagenet2012.
  name = data_cfg.source.partition(':')[0]
  if name not in NAMES:
    raise ValueError(
      f'data.source={data_cfg.source!r} is unknown; accepted:'
      f' {", ".join(NAMES)}.{nearest(str(name), NAMES)}'
    )
  module = importlib.import_module(f'{__name__}.{name}')
  source = module.make(data_cfg, chosen)
  kinds = getattr(data_cfg, 'control', ())
  if not kinds or isinstance(source, Rows):  # they are in the rows
    return source
  return Controlled(source, kinds, data_cfg.control_path)


def make_mixture(data_cfg: Any, split: str) -> Mixture:
  """All parts of `data_cfg.mixture` as one source.

  A part has the fields of the section where it does not set its own; its path
  is relative to `data.path`.

  Raises:
    ValueError: names the part that is refused.
  """
  parts = []
  for i, part in enumerate(data_cfg.mixture):
    own = dataclasses.replace(
      data_cfg,
      mixture=(),
      source=part.source,
      path=os.path.join(data_cfg.path, part.path),
      kind=part.kind or data_cfg.kind,
      columns=part.columns or data_cfg.columns,
    )
    try:
      parts.append(make_source(own, part.split or split))
    except ValueError as error:
      raise ValueError(f'data.mixture[{i}], {part.source}: {error}') from error
  cached = [isinstance(part, Rows) for part in parts]
  if any(cached) and not all(cached):
    raise ValueError(
      'data.mixture: some parts are caches and others are not; accepted: all '
      'or none (scar tokenize makes a cache of each part by itself)'
    )
  mixture = Mixture
  if all(cached):
    mixture = importlib.import_module(f'{__name__}.cache').CacheMixture
  return mixture(parts, [part.weight for part in data_cfg.mixture])
