"""LlamaGen GPT and EditAR checkpoints -> parameters of a `Scar`.

In: a torch state dict as numpy arrays: class or caption models of
FoundationVision/LlamaGen, and EditAR's release. Out: the `params` tree of
`Scar(cfg)`. Method 11.2 and 11.3 are the tables; `scar_official.py` adds the
rows of the compressed prefix.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert import llamagen_gpt
from scar_jax.convert.common import Entry, assemble, disassemble
from scar_jax.convert.gpt_sizes import (
  artifact,
  detect_editor,
  model_of,
  size,
)
from scar_jax.models.conditions import empty_conditions
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.parts import EditorConfig
from scar_jax.types import PyTree

__all__ = [
  'abstract_params', 'artifact', 'convert', 'detect', 'reverse', 'size',
  'table',
]  # fmt: skip

detect = detect_editor
NULL_PREFIX = 'img_uncond_embedding'
# Buffers, caches, and heads that only training used.
SKIP = (
  *llamagen_gpt.SKIP,
  r'alignment\..*',
  r'alignment_layer\..*',
  r'dinov2\..*',
)


def table(cfg: ScarConfig) -> list[Entry]:
  """All rows of a model without compressed prefix.

  Raises:
    ValueError: a text kind or an injection that no public checkpoint has.
  """
  if cfg.prefix.inject != 'prefill':
    raise ValueError(
      f'prefix.inject={cfg.prefix.inject!r} has no counterpart in a public '
      "checkpoint; accepted: 'prefill' (set --config.prefix.inject)"
    )
  entries = [
    *llamagen_gpt.decoder_table('decoder/'),
    *llamagen_gpt.embedder_table(cfg.text.kind, 'text/'),
  ]
  if cfg.has_null_prefix:
    entries.append(Entry('null_prefix', (NULL_PREFIX,)))
  return entries


@functools.lru_cache(maxsize=8)  # tracing the model takes its time
def abstract_params(cfg: ScarConfig) -> PyTree:
  """Shapes of `Scar(cfg)`'s parameters, without making any."""
  tokens = jnp.zeros((1, cfg.grid[0] * cfg.grid[1]), jnp.int32)
  streams = ('params', 'order')
  return jax.eval_shape(
    lambda: Scar(cfg).init(
      dict.fromkeys(streams, jax.random.key(0)),
      tokens,
      empty_conditions(cfg, 1),
    )
  )['params']


def convert(
  cfg: ScarConfig | EditorConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `Scar(cfg)`.

  Args:
    cfg: of the checkpoint: `text.kind` 'label' or 't5', prefix 'off' (LlamaGen)
      or 'vq' (EditAR); `prefix_mask='causal'`, `text_rope='zero'` to reproduce
      its logits.
    state: torch tensors.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  cfg = model_of(cfg)
  skip = SKIP if cfg.has_null_prefix else (*SKIP, NULL_PREFIX)
  return assemble(table(cfg), state, abstract_params(cfg), skip)


def reverse(cfg: ScarConfig | EditorConfig, params: PyTree) -> dict[str, Any]:
  """The tensors of an artifact, under the reference's names.

  Raises:
    ValueError: a model that is neither LlamaGen's nor EditAR's.
  """
  model = model_of(cfg)
  if model.prefix.compress not in ('off', 'vq') or model.order != 'raster':
    raise ValueError(
      f'prefix.compress={model.prefix.compress!r}, order={model.order!r} has '
      "no counterpart in LlamaGen or EditAR; accepted: 'off' or 'vq', 'raster'"
    )
  return disassemble(table(model), params)
