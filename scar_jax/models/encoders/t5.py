"""The T5 encoder: token ids to features, frozen or trained with the model.

In: ids `[B, T]`, mask `[B, T]` (True at real tokens). Out: `[B, T, D]` after
the final norm. Frozen flan-T5 comes through `convert/t5.py`; the byte-level
small one (`t5_config('byte')`) is a submodule of `models/text_embedder.py`.
Source: huggingface/transformers `T5EncoderModel`, method 5.5.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models.encoders import blocks
from scar_jax.models.layers import RMSNorm
from scar_jax.sharding import annotated, constrain


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes; the defaults are flan-t5-xl."""

  vocab: int = 32128
  width: int = 2048  # features D
  layers: int = 24
  heads: int = 32
  head_dim: int = 64  # heads * head_dim need not be the width
  ffn: int = 5120  # of each half of the gated feed-forward
  buckets: int = 32  # of relative distance, both directions
  max_distance: int = 128  # tokens; farther ones share the last bucket
  norm_eps: float = 1e-6
  dtype: str = 'float32'  # 'bfloat16' is safe; float16 overflows
  ngrams: tuple[int, ...] = ()  # lengths that also have embeddings, hashed
  ngram_rows: int = 4096  # of the table of each length

  def __post_init__(self):
    if any(n < 2 for n in self.ngrams) or self.ngram_rows < 1:
      raise ValueError(
        f'T5 ngrams={self.ngrams} with ngram_rows={self.ngram_rows}; accepted: '
        'lengths of 2 or more, 1 row or more'
      )
    if self.buckets % 4 or self.buckets < 4:
      raise ValueError(
        f'T5 buckets={self.buckets}; accepted: a multiple of 4 (half for each '
        'direction, half of those exact)'
      )


_SIZES: dict[str, dict[str, Any]] = {
  'flan-t5-xl': {},
  'flan-t5-large': dict(width=1024, heads=16, ffn=2816),
  'flan-t5-base': dict(width=768, layers=12, heads=12, ffn=2048),
  'flan-t5-small': dict(width=512, layers=8, heads=6, ffn=1024),
  # 256 bytes + pad, end and unknown, rounded up to a multiple of 8.
  'byte': dict(
    vocab=264, width=128, layers=2, heads=4, head_dim=32, ffn=256
  ),
}  # fmt: skip


def t5_config(size: str, **overrides: Any) -> T5Config:
  """A config by size name.

  Raises:
    ValueError: unknown size.
  """
  if size not in _SIZES:
    raise ValueError(f'T5 size {size!r}; accepted: {", ".join(_SIZES)}')
  return T5Config(**(_SIZES[size] | overrides))


def relative_buckets(
  length: int, buckets: int, max_distance: int
) -> Int[np.ndarray, 'T T']:
  """Bucket of key j as seen from query i, `[i, j]`.

  Half of the buckets are for keys to the right. Of each half, the first half
  holds one distance each, the rest grow logarithmically.
  """
  n = np.arange(length)[None] - np.arange(length)[:, None]
  half, exact, m = buckets // 2, buckets // 4, np.abs(n)
  # float64: distances such as 16 and 64 lie exactly on a step.
  growth = np.log(np.maximum(m, 1) / exact) / np.log(max_distance / exact)
  far = np.minimum(exact + np.floor(growth * (half - exact)), half - 1)
  return (np.where(n > 0, half, 0) + np.where(m < exact, m, far)).astype(
    np.int32
  )


def hash_ngrams(ids: Int[Array, 'B T'], n: int, rows: int) -> Int[Array, 'B T']:
  """A row for the n ids that end at each position.

  A polynomial modulo 2**32, whose upper half says more than its lower one.
  Before the start there are zeros.
  """
  total = jnp.zeros(ids.shape, jnp.uint32)
  for back in reversed(range(n)):
    shifted = jnp.pad(ids, ((0, 0), (back, 0)))[:, : ids.shape[1]]
    total = total * jnp.uint32(0x01000193) + shifted.astype(jnp.uint32) + 1
  mixed = total * jnp.uint32(0x9E3779B1)
  return ((mixed >> 16) % jnp.uint32(rows)).astype(jnp.int32)


class _Block(nn.Module):
  cfg: T5Config

  @nn.compact
  def __call__(self, x, bias, mask):
    cfg = self.cfg
    H, K, D = cfg.heads, cfg.head_dim, cfg.width
    kw = dict(use_bias=False, dtype=cfg.dtype)

    def normal(std):
      return nn.initializers.normal(std)

    def project(name, std):
      return blocks.linear(
        (H, K),
        ('embed', 'heads', 'head_dim'),
        kernel_init=normal(std),
        name=name,
        **kw,
      )

    entering = x
    y = RMSNorm(cfg.norm_eps, cfg.dtype, name='attn_norm')(x)
    # The logits are not scaled; q starts small instead.
    q = project('q', (D * K) ** -0.5)(y)
    k, v = project('k', D**-0.5)(y), project('v', D**-0.5)(y)
    y = blocks.biased_attention(q, k, v, 1.0, bias, mask)
    x = x + blocks.linear(
      (D,), ('heads', 'head_dim', 'embed'), kernel_init=normal((H * K) ** -0.5),
      name='o', **kw,
    )(y)  # fmt: skip
    y = RMSNorm(cfg.norm_eps, cfg.dtype, name='ffn_norm')(x)
    gate, value = (
      blocks.linear(
        (cfg.ffn,),
        ('embed', 'mlp'),
        kernel_init=normal(D**-0.5),
        name=name,
        **kw,
      )(y)
      for name in ('wi_0', 'wi_1')
    )
    x = x + blocks.linear(
      (D,), ('mlp', 'embed'), kernel_init=normal(cfg.ffn**-0.5), name='wo', **kw
    )(blocks.gelu_tanh(gate) * value)
    x = constrain(x, 'batch', None, 'act_embed')
    return x, entering


class T5Encoder(nn.Module):
  """Bidirectional encoder with relative positions.

  With `ngrams`, an id is embedded together with the ones before it, so that a
  small encoder over bytes need not learn first what a word is (the idea of the
  hash embeddings in facebookresearch/blt).
  """

  cfg: T5Config

  def setup(self):
    cfg = self.cfg
    self.embed = self.param(
      'embed',
      annotated(nn.initializers.normal(1.0), 'vocab', 'embed'),
      (cfg.vocab, cfg.width),
    )
    self.ngram_tables = [
      self.param(
        f'ngrams_{n}',
        annotated(nn.initializers.normal(1.0), 'vocab', 'embed'),
        (cfg.ngram_rows, cfg.width),
      )
      for n in cfg.ngrams
    ]
    self.relative = self.param(
      'relative',
      annotated(nn.initializers.normal(cfg.width**-0.5), None, 'heads'),
      (cfg.buckets, cfg.heads),
    )
    self.layers = nn.scan(
      _Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=cfg.layers,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(cfg, name='layers')
    self.norm = RMSNorm(cfg.norm_eps, cfg.dtype, name='norm')

  def position_bias(self, length: int) -> Float[Array, '1 H T T']:
    """What every layer adds to its attention logits."""
    cfg = self.cfg
    ids = relative_buckets(length, cfg.buckets, cfg.max_distance)
    bias = jnp.asarray(self.relative, jnp.float32)[ids]
    return bias.transpose(2, 0, 1)[None]

  def hidden_states(
    self, ids: Int[Array, 'B T'], mask: Bool[Array, 'B T'] | None = None
  ) -> tuple[Float[Array, 'B T D'], Float[Array, 'N B T D']]:
    """Output before the final norm, and the input of each layer."""
    cfg = self.cfg
    # Whole: from parts of a table, rows of all devices come to every part.
    x = constrain(jnp.asarray(self.embed), None, None)[ids]
    for n, table in zip(cfg.ngrams, self.ngram_tables, strict=True):
      x = x + jnp.asarray(table)[hash_ngrams(ids, n, cfg.ngram_rows)]
    x = x.astype(cfg.dtype)
    if mask is not None:
      mask = jnp.broadcast_to(mask[:, None], (*ids.shape, ids.shape[1]))
    return self.layers(x, self.position_bias(ids.shape[1]), mask)

  def __call__(
    self, ids: Int[Array, 'B T'], mask: Bool[Array, 'B T'] | None = None
  ) -> Float[Array, 'B T D']:
    """Features of every position.

    Args:
      ids: token ids; ids outside the vocabulary are the caller's mistake.
      mask: True at real tokens; None sees all. Features at padding are finite
        but mean nothing; a row without real tokens is finite too.
    """
    return self.norm(self.hidden_states(ids, mask)[0])
