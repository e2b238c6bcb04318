"""LlamaGen GPT and EditAR checkpoints -> parameters of a `Scar`.

In: a torch state dict as numpy arrays: class or caption models of
FoundationVision/LlamaGen, and EditAR's release. Out: the `params` tree of
`Scar(cfg)`. Method 11.2 and 11.3 are the tables; `scar_official.py` adds the
rows of the compressed prefix.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert.stacked import Entry, assemble, linear
from scar_jax.models.scar import Scar, empty_conditions
from scar_jax.models.scar_config import ScarConfig
from scar_jax.types import PyTree

NULL_PREFIX = 'img_uncond_embedding'
# Buffers, caches, and heads that only training used.
SKIP = (
  r'freqs_cis',
  r'causal_mask',
  r'.*\.kv_cache\..*',
  r'alignment\..*',
  r'alignment_layer\..*',
  r'dinov2\..*',
)


def decoder_table() -> list[Entry]:
  """Rows of the transformer, at `decoder/`."""
  layer, ours = 'layers.{i}', 'decoder/layers'
  entries = [
    Entry('decoder/token/embedding', ('tok_embeddings.weight',)),
    Entry('decoder/norm/scale', ('norm.weight',)),
    *linear('decoder/head', 'output', bias=False),
    *linear(f'{ours}/attn/qkv', f'{layer}.attention.wqkv', bias=False),
    *linear(f'{ours}/attn/out', f'{layer}.attention.wo', bias=False),
  ]
  for name, source in (('attn', 'attention'), ('ffn', 'ffn')):
    path = f'{ours}/{name}_norm/scale'
    entries.append(Entry(path, (f'{layer}.{source}_norm.weight',)))
  for name in ('w1', 'w2', 'w3'):
    source = f'{layer}.feed_forward.{name}'
    entries += linear(f'{ours}/ffn/{name}', source, bias=False)
  return entries


def table(cfg: ScarConfig) -> list[Entry]:
  """All rows of a model without compressed prefix.

  Raises:
    ValueError: a text kind that no public checkpoint has.
  """
  entries, source = decoder_table(), 'cls_embedding'
  if cfg.text.kind == 'label':
    entries.append(Entry('text/table', (f'{source}.embedding_table.weight',)))
  elif cfg.text.kind == 't5':
    entries.append(Entry('text/null_text', (f'{source}.uncond_embedding',)))
    for name in ('fc1', 'fc2'):
      entries += linear(f'text/{name}', f'{source}.cap_proj.{name}', bias=False)
  else:
    raise ValueError(
      f'text.kind={cfg.text.kind!r} is in no public checkpoint; accepted: '
      'label, t5 (set --config.text.kind)'
    )
  if cfg.has_null_prefix:
    entries.append(Entry('null_prefix', (NULL_PREFIX,)))
  return entries


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


def convert(cfg: ScarConfig, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The `params` of `Scar(cfg)`.

  Args:
    cfg: of the checkpoint: `text.kind` 'label' or 't5', prefix 'off' (LlamaGen)
      or 'vq' (EditAR); `prefix_mask='causal'`, `text_rope='zero'` to reproduce
      its logits.
    state: torch tensors.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  skip = SKIP if cfg.has_null_prefix else (*SKIP, NULL_PREFIX)
  return assemble(table(cfg), state, abstract_params(cfg), skip)
