"""Data sources by name.

In: the `data` section of a config and a split. Out: a `records.Source`. A
source is one module of this package with a function `make(data_cfg, split)`;
it is imported only when asked for, so its libraries may be optional.
"""

import importlib
from typing import Any

from scar_jax.config_values import nearest
from scar_jax.data.controls import Controlled
from scar_jax.data.records import Source

NAMES = ('openmoji', 'scenes', 'folder')


def make_source(data_cfg: Any, split: str | None = None) -> Source:
  """The source that `data_cfg.source` names.

  Args:
    data_cfg: anything with the fields of `config.DataConfig`.
    split: which part; None is `data_cfg.split`.

  Raises:
    ValueError: no such source, or the source refuses its settings.
  """
  name = data_cfg.source
  if name not in NAMES:
    raise ValueError(
      f'data.source={name!r} is unknown; accepted: {", ".join(NAMES)}.'
      f'{nearest(str(name), NAMES)}'
    )
  module = importlib.import_module(f'{__name__}.{name}')
  source = module.make(data_cfg, data_cfg.split if split is None else split)
  kinds = getattr(data_cfg, 'control', ())
  return Controlled(source, kinds, data_cfg.control_path) if kinds else source
