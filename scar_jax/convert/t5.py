"""Names of public T5 encoders (Hugging Face) and where each tensor goes.

In: a torch state dict as numpy arrays, of a whole T5 or its encoder. Out: the
`params` of `T5Encoder`. Method 11.7 is the table; names are those of
huggingface/transformers `T5EncoderModel`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert.common import Entry, assemble, linear
from scar_jax.convert.sizes import layers_of, shape_of
from scar_jax.models.encoders.t5 import T5Config, T5Encoder, t5_config

SKIP = (r'decoder\..*', r'lm_head\..*', r'encoder\.embed_tokens\.weight')


def table(embedding: str = 'shared.weight') -> list[Entry]:
  """Every tensor of the checkpoint.

  Args:
    embedding: which of the two names of the same table is read.
  """
  attn = 'encoder.block.{i}.layer.0'
  ffn = 'encoder.block.{i}.layer.1'
  first = 'encoder.block.0.layer.0.SelfAttention'
  entries = [
    Entry('embed', (embedding,)),
    Entry('relative', (f'{first}.relative_attention_bias.weight',)),
    Entry('layers/attn_norm/scale', (f'{attn}.layer_norm.weight',)),
    Entry('layers/ffn_norm/scale', (f'{ffn}.layer_norm.weight',)),
    Entry('norm/scale', ('encoder.final_layer_norm.weight',)),
  ]
  for name in 'qkvo':
    source = f'{attn}.SelfAttention.{name}'
    dims = 2 if name == 'o' else 1
    entries += linear(f'layers/{name}', source, bias=False, in_dims=dims)
  for name in ('wi_0', 'wi_1', 'wo'):
    source = f'{ffn}.DenseReluDense.{name}'
    entries += linear(f'layers/{name}', source, bias=False)
  return entries


def convert(cfg: T5Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The `params` of `T5Encoder(cfg)`.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  abstract = jax.eval_shape(T5Encoder(cfg).init, jax.random.key(0), ids)
  shared = 'shared.weight'
  name = shared if shared in state else 'encoder.embed_tokens.weight'
  return assemble(table(name), state, abstract['params'], SKIP)


def detect(state: Mapping[str, Any]) -> T5Config:
  """The encoder that a checkpoint holds, from shapes alone.

  Raises:
    ValueError: tensors that the sizes are read from are missing.
  """
  shapes = getattr(state, 'shapes', state)
  shared = 'shared.weight'
  name = shared if shared in shapes else 'encoder.embed_tokens.weight'
  vocab, width = shape_of(shapes, name)
  block = 'encoder.block.0.layer'
  attn = f'{block}.0.SelfAttention'
  buckets, heads = shape_of(shapes, f'{attn}.relative_attention_bias.weight')
  return T5Config(
    vocab=vocab,
    width=width,
    layers=layers_of('encoder.block.', shapes),
    heads=heads,
    head_dim=shape_of(shapes, f'{attn}.q.weight')[0] // heads,
    ffn=shape_of(shapes, f'{block}.1.DenseReluDense.wi_0.weight')[0],
    buckets=buckets,
  )


def size(cfg: T5Config) -> str:
  """Name of the size, or 'custom'."""
  for name in ('xl', 'large', 'base', 'small'):
    if t5_config(f'flan-t5-{name}') == cfg:
      return f'flan-t5-{name}'
  return 'custom'
