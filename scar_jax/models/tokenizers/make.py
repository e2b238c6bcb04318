"""Either image tokenizer from its config: of one scale (VQ) or of many (VAR).

In: a size and changed fields, or a config dataclass. Out: the config, or the
Flax module; both modules have `encode`, `table`, `decode_tokens` and a training
pass with the same fields. Called by the tokenizer task, `parts.py`, scores.
"""

import dataclasses
from typing import Any

from scar_jax.models.tokenizers.msvq import MSVQModel
from scar_jax.models.tokenizers.msvq_config import MSVQConfig, msvq_config
from scar_jax.models.tokenizers.vq import VQConfig, VQModel, vq_config

TokenizerConfig = VQConfig | MSVQConfig


def tokenizer_config(size: str, **values: Any) -> TokenizerConfig:
  """A config by size; sides of scales or a VAR size make it multi-scale.

  Args:
    size: of `vq_config` or `msvq_config`; 'tiny' is known to both.
    **values: fields that differ.

  Raises:
    ValueError: unknown size, or a field that this kind does not have.
  """
  scales = 'patch_nums' in values or size.startswith('var')
  make, kind = (msvq_config, MSVQConfig) if scales else (vq_config, VQConfig)
  known = {field.name for field in dataclasses.fields(kind)}
  if strange := sorted(set(values) - known):
    name = strange[0]
    raise ValueError(
      f'model.{name}={values[name]!r} means nothing to a '
      f'{"multi" if scales else "single"}-scale tokenizer; accepted: '
      f'{", ".join(sorted(known))} (set --config.model.patch_nums to the sides '
      'of the scales for a multi-scale one)'
    )
  return make(size, **values)


def make_tokenizer(cfg: TokenizerConfig) -> Any:
  """The Flax module of a config."""
  return MSVQModel(cfg) if is_multi_scale(cfg) else VQModel(cfg)


def is_multi_scale(cfg: TokenizerConfig) -> bool:
  """Its tokens are those of several scales, `[B, N]`, instead of a grid."""
  return isinstance(cfg, MSVQConfig)
