"""AMAP-ML/SCAR's tensor names -> parameters of a `Scar`.

In: a torch state dict as numpy arrays, should weights ever be released. Out:
the `params` tree of `Scar(cfg)` with a compressed prefix of k = 2. Method 11.4
is the table. Its null prefix is never trained and is left out.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from scar_jax.convert import editar
from scar_jax.convert.common import (
  Entry,
  assemble,
  conv,
  disassemble,
  linear,
)
from scar_jax.convert.gpt_sizes import (
  artifact,
  detect_editor,
  model_of,
  size,
)
from scar_jax.models.scar_config import ScarConfig
from scar_jax.parts import EditorConfig
from scar_jax.types import PyTree

__all__ = ['artifact', 'convert', 'detect', 'reverse', 'size', 'table']
detect = functools.partial(detect_editor, kind='scar')


def table(cfg: ScarConfig) -> list[Entry]:
  """All rows.

  Raises:
    ValueError: another compression than the released file has.
  """
  prefix = cfg.prefix
  if prefix.compress != 'full' or prefix.k != 2 or cfg.has_null_prefix:
    raise ValueError(
      f'prefix.compress={prefix.compress!r}, k={prefix.k}, '
      f'cond_dropout={cfg.cond_dropout!r} is not the official model; accepted: '
      "'full', 2, 'text' (set --config.prefix and model.cond_dropout)"
    )
  return [
    *editar.table(cfg),
    *conv('prefix/compress/conv0', 'downsample_conv'),
    *conv('prefix/restore/conv_in', 'upsampler.0'),
    *conv('prefix/restore/conv_out', 'upsampler.2'),
    *linear('prefix/proj', 'dino_mlp', bias=False),
  ]


def convert(
  cfg: ScarConfig | EditorConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `Scar(cfg)`; the encoder's tensors go to its own table.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  cfg = model_of(cfg)
  skip = (*editar.SKIP, editar.NULL_PREFIX)
  return assemble(table(cfg), state, editar.abstract_params(cfg), skip)


def reverse(cfg: ScarConfig | EditorConfig, params: PyTree) -> dict[str, Any]:
  """The tensors of an artifact, under the reference's names.

  Raises:
    ValueError: another compression than the released file has.
  """
  return disassemble(table(model_of(cfg)), params)
