"""Names of the public LlamaGen GPT checkpoints and where each tensor goes.

In: a torch state dict as numpy arrays (`c2i_*`, `t2i_*`). Out: parameters of
the decoder and of the class or caption embedder. Method 11.2 is the table; the
names are those of FoundationVision/LlamaGen `Transformer`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert.common import Entry, assemble, linear
from scar_jax.models.decoder import DecoderConfig, SetDecoder

# Buffers and caches of the reference; the embedders have their own table.
SKIP = (r'freqs_cis', r'causal_mask', r'.*\.kv_cache\..*')
EMBEDDER = r'cls_embedding\..*'


def decoder_table(root: str = '') -> list[Entry]:
  """Rows of the transformer; `root` is put before our paths (`decoder/`)."""
  layer, ours = 'layers.{i}', f'{root}layers'
  return [
    Entry(f'{root}token/embedding', ('tok_embeddings.weight',)),
    Entry(f'{root}norm/scale', ('norm.weight',)),
    *linear(f'{root}head', 'output', bias=False),
    Entry(f'{ours}/attn_norm/scale', (f'{layer}.attention_norm.weight',)),
    Entry(f'{ours}/ffn_norm/scale', (f'{layer}.ffn_norm.weight',)),
    *linear(f'{ours}/attn/qkv', f'{layer}.attention.wqkv', bias=False),
    *linear(f'{ours}/attn/out', f'{layer}.attention.wo', bias=False, in_dims=2),
    *(
      entry
      for name in ('w1', 'w3', 'w2')
      for entry in linear(
        f'{ours}/ffn/{name}', f'{layer}.feed_forward.{name}', bias=False
      )
    ),
  ]


def embedder_table(kind: str, root: str = '') -> list[Entry]:
  """Rows of the class ('label') or caption ('t5') embedder.

  Raises:
    ValueError: a kind that no public checkpoint has.
  """
  source = 'cls_embedding'
  if kind == 'label':
    return [Entry(f'{root}table', (f'{source}.embedding_table.weight',))]
  if kind == 't5':
    return [
      Entry(f'{root}null_text', (f'{source}.uncond_embedding',)),
      *linear(f'{root}fc1', f'{source}.cap_proj.fc1', bias=False),
      *linear(f'{root}fc2', f'{source}.cap_proj.fc2', bias=False),
    ]
  raise ValueError(
    f'text.kind={kind!r} is in no public checkpoint; accepted: label, t5 '
    '(set --config.text.kind)'
  )


@functools.lru_cache(maxsize=8)  # tracing the model takes its time
def abstract_decoder(cfg: DecoderConfig) -> Any:
  """Shapes of all parameters of `SetDecoder(cfg)`, nothing allocated."""
  x = jax.ShapeDtypeStruct((1, 1, cfg.width), jnp.float32)
  ids = jax.ShapeDtypeStruct((1,), jnp.int32)
  cond = None
  if cfg.block == 'adaln':
    cond = jax.ShapeDtypeStruct((1, cfg.width), jnp.float32)

  def touch(module: SetDecoder, x: Any, ids: Any, cond: Any) -> Any:
    hidden, _ = module(x, None, ids, cond=cond)
    token = None if cfg.block == 'adaln' else module.embed(ids)
    return module.logits(hidden), token

  def init(key: Any, x: Any, ids: Any, cond: Any) -> Any:
    return SetDecoder(cfg).init(key, x, ids, cond, method=touch)

  return jax.eval_shape(init, jax.random.key(0), x, ids, cond)['params']


def convert_decoder(
  cfg: DecoderConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `SetDecoder(cfg)`; the embedders' tensors are left out.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  skip = (*SKIP, EMBEDDER)
  return assemble(decoder_table(), state, abstract_decoder(cfg), skip)
