"""SetDecoder: the set-causal transformer behind all three orders.

In: embeddings `[B, L, D]`, rotary tables and set ids, with a key-value cache
when sampling. Out: hidden states after the final norm, the cache, and float32
logits through the head. Layers are scanned; their parameters carry a leading
layer axis under `layers` whether the scan is unrolled or not.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models import layers as nl
from scar_jax.models.attention import BACKENDS, choose_backend, in_parts
from scar_jax.models.blocks import (
  Carry,
  Modulation,
  Shared,
  ada_of_layers,
  ada_std,
  by_position,
)
from scar_jax.models.cache import KVCache, cache_mask, empty_cache
from scar_jax.models.dense import Dense
from scar_jax.models.inject import Injection
from scar_jax.models.remat import REMAT
from scar_jax.models.stack import run_layers
from scar_jax.orders.layout import set_mask
from scar_jax.sharding import constrain, platform

BLOCKS = ('llama', 'adaln')
Rope = tuple[Float[Array, '*B L F'], Float[Array, '*B L F']]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder. Dropouts are rates in [0, 1).

  Attributes:
    width: D.
    layers: number of blocks.
    heads: H, divides the width.
    vocab: V, codebook size.
    mlp_hidden: F; 0 follows the block: 2/3 of 4 D rounded up to a multiple of
      `multiple_of` (llama), or 4 D (adaln).
    multiple_of: see `mlp_hidden`; 256 in all public sizes.
    norm_eps: of the norms; 1e-5 in LlamaGen, 1e-6 in VAR.
    rope_base: of the rotary frequencies.
    resid_dropout: after the attention's output projection.
    ffn_dropout: after the feed-forward.
    attn_dropout: on attention weights.
    drop_path: rate of the last block, linear from 0 at the first.
    remat: a value of `remat.REMAT`: what the backward pass computes again.
    scan: one compiled layer in a loop, or all layers unrolled.
    attention: a backend of `models.attention`, of passes without a cache.
    shard_length: the residual stream is split over the tensor axis along the
      sequence; less memory, the same bytes exchanged.
    dtype: of matmuls and the cache.
    residual_dtype: of the residual stream.
    init_std: of the llama block's weights; its head starts at zero.
    block: a value of `BLOCKS`.
    qk_norm: l2-normalised q and k with a learned scale per head (adaln).
    shared_ada: one AdaLN projection for all blocks (adaln).
    ada_gate: factor on the initial gates (adaln).
  """

  width: int = 256
  layers: int = 4
  heads: int = 4
  vocab: int = 512
  mlp_hidden: int = 0
  multiple_of: int = 256
  norm_eps: float = 1e-5
  rope_base: float = 10000.0
  resid_dropout: float = 0.1
  ffn_dropout: float = 0.1
  attn_dropout: float = 0.0
  drop_path: float = 0.0
  remat: str = 'none'
  scan: bool = True
  attention: str = 'auto'
  shard_length: bool = False
  dtype: str = 'float32'
  residual_dtype: str = 'float32'
  init_std: float = 0.02
  block: str = 'llama'
  qk_norm: bool = True
  shared_ada: bool = False
  ada_gate: float = 1e-3

  def __post_init__(self):
    choices = {'remat': REMAT, 'block': BLOCKS, 'attention': BACKENDS}
    for name, accepted in choices.items():
      if getattr(self, name) not in accepted:
        raise ValueError(
          f'{name}={getattr(self, name)!r}; accepted: {", ".join(accepted)} '
          f'(set --config.model.{name})'
        )
    for name in ('width', 'layers', 'heads', 'vocab', 'multiple_of'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name}={getattr(self, name)}; accepted: 1 or more '
          f'(set --config.model.{name})'
        )
    for name in ('resid_dropout', 'ffn_dropout', 'attn_dropout', 'drop_path'):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise ValueError(
          f'{name}={getattr(self, name)}; accepted: 0 to below 1 '
          f'(set --config.model.{name})'
        )
    if self.width % self.heads:
      fits = [h for h in range(1, self.width + 1) if self.width % h == 0]
      raise ValueError(
        f'heads={self.heads} does not divide width={self.width}; '
        f'accepted: {fits} (set --config.model.heads)'
      )

  @property
  def head_dim(self) -> int:
    """K."""
    return self.width // self.heads

  @property
  def head_dtype(self) -> str:
    """Type of the head's matrix product."""
    return 'float32' if self.block == 'adaln' else self.dtype

  @property
  def hidden(self) -> int:
    """F."""
    if self.mlp_hidden:
      return self.mlp_hidden
    if self.block == 'adaln':
      return 4 * self.width
    wanted = int(2 * 4 * self.width / 3)
    return -(-wanted // self.multiple_of) * self.multiple_of


def _llama(width: int, layers: int, heads: int, vocab: int = 16384, **more):
  return dict(width=width, layers=layers, heads=heads, vocab=vocab, **more)


def _var(depth: int, gate: float, shared: bool = False):
  return dict(
    width=64 * depth,
    layers=depth,
    heads=depth,
    vocab=4096,
    block='adaln',
    norm_eps=1e-6,
    resid_dropout=0.0,
    ffn_dropout=0.0,
    drop_path=0.1 * depth / 24,
    ada_gate=gate,
    shared_ada=shared,
  )


# LlamaGen's sizes by letter, VAR's by depth, and two for one CPU.
SIZES: dict[str, dict[str, Any]] = {
  'tiny': _llama(128, 3, 2, 512, multiple_of=32),
  'small': _llama(256, 6, 8, 512, multiple_of=32),
  'B': _llama(768, 12, 12),
  'L': _llama(1024, 24, 16),
  'XL': _llama(1280, 36, 20),
  'XXL': _llama(1536, 48, 24),
  'XXXL': _llama(2560, 48, 40),
  '1B': _llama(2048, 22, 32),
  '3B': _llama(3200, 24, 32),
  '7B': _llama(4096, 32, 32),
  'd16': _var(16, 1e-3),
  'd20': _var(20, 1e-3),
  'd24': _var(24, 1e-4),
  'd30': _var(30, 1e-5),
  'd36': _var(36, 5e-6, shared=True),
}


def decoder_size(name: str, **overrides: Any) -> DecoderConfig:
  """The configuration of a named size (method 3.1, 4.1).

  Args:
    name: a key of `SIZES`.
    **overrides: fields of `DecoderConfig` that replace the size's own.

  Raises:
    ValueError: unknown name.
  """
  if name not in SIZES:
    raise ValueError(
      f'model.size={name!r}; accepted: {", ".join(SIZES)} '
      '(set --config.model.size)'
    )
  return DecoderConfig(**{**SIZES[name], **overrides})


def make_cache(
  cfg: DecoderConfig, batch: int, size: int, dtype: str | None = None
) -> KVCache:
  """An empty cache of `size` slots for `batch` rows (guidance included)."""
  return empty_cache(
    cfg.layers, batch, size, cfg.heads, cfg.head_dim, dtype or cfg.dtype
  )


class SetDecoder(nn.Module):
  """The transformer: token table, blocks, final norm, head."""

  cfg: DecoderConfig

  def setup(self):
    cfg = self.cfg
    if cfg.block == 'llama':
      self.token = nl.Embed(
        cfg.vocab,
        cfg.width,
        kernel_init=nn.initializers.normal(cfg.init_std),
        dtype=cfg.residual_dtype,
      )
      self.norm = nl.RMSNorm(cfg.norm_eps, cfg.dtype)
      self.head = Dense(
        (cfg.vocab,),
        ('embed', 'vocab'),
        kernel_init=nn.initializers.zeros,
        dtype=cfg.head_dtype,
        out_dtype='float32',
      )
      return
    std = ada_std(cfg.width)

    def dense(size: int, out_axis: str, factor: float) -> Dense:
      return Dense(
        (size,),
        ('embed', out_axis),
        use_bias=True,
        kernel_init=nn.initializers.normal(std * factor),
      )

    if cfg.shared_ada:
      self.shared_ada = dense(6 * cfg.width, 'mlp', 1.0)
    self.head_ada = dense(2 * cfg.width, 'mlp', 0.5)
    self.head = dense(cfg.vocab, 'vocab', 0.02)

  def embed(self, tokens: Int[Array, '*B']) -> Float[Array, '*B D']:
    """Token embeddings (llama block only); ids below 0 give a valid row."""
    return self.token(tokens)

  def logits(self, hidden: Float[Array, '*B D']) -> Float[Array, '*B V']:
    """Float32 logits of hidden states after the final norm."""
    x = self.head(hidden)
    return constrain(x, 'batch', *(None,) * (x.ndim - 2), 'act_vocab')

  def final_norm(
    self,
    x: Float[Array, 'B L D'],
    cond: Float[Array, 'B *n D'] | Modulation | None = None,
    early: Bool[Array, ' L'] | None = None,
  ) -> Float[Array, 'B L D']:
    """The norm before the head; AdaLN's is float32 and needs `cond`."""
    if self.cfg.block == 'llama':
      return self.norm(x)
    ada = cond.head if isinstance(cond, Modulation) else self._head_ada(cond)
    scale, shift = jnp.split(by_position(ada, early, x.shape[1]), 2, -1)
    return nl.layer_norm(x, self.cfg.norm_eps) * (1 + scale) + shift

  def modulate(self, cond: Float[Array, 'B D']) -> Modulation:
    """What a condition does in all layers: the same in a sampler's steps."""
    layers = nn.unbox(self.variables)['params']['layers']
    ada = ada_of_layers(self.cfg, layers, self._ada_input(cond))
    return Modulation(cond, ada, self._head_ada(cond))

  def _head_ada(self, cond: Float[Array, 'B *n D']) -> Array:
    return self.head_ada(nn.silu(cond.astype(jnp.float32)))

  def _ada_input(self, cond: Float[Array, 'B *n D']) -> Array:
    cond = nn.silu(cond.astype(jnp.float32))
    if self.cfg.shared_ada:
      cond = self.shared_ada(cond).reshape(*cond.shape[:-1], 6, self.cfg.width)
    return cond

  @nn.compact
  def blocks(
    self,
    x: Float[Array, 'B L D'],
    rope: Rope | None,
    set_ids: Int[Array, ' L'],
    cache: KVCache | None = None,
    key_valid: Bool[Array, 'B L'] | None = None,
    cond: Float[Array, 'B *n D'] | Modulation | None = None,
    deterministic: bool = True,
    padding: tuple[int, int] | None = None,
    early: Bool[Array, ' L'] | None = None,
    inject: Injection | None = None,
  ) -> tuple[Float[Array, 'B L D'], KVCache | None]:
    """All blocks, without the final norm; see `__call__`.

    Args:
      x: see there.
      rope: see there.
      set_ids: see there; without a cache in numpy, for kernels.
      cache: see there.
      key_valid: see there.
      cond: see there; with `early` two vectors for each sample, [B, 2, D].
      deterministic: see there.
      padding: [first, last) positions outside of which every key is valid.
      early: positions that read the first of the two vectors.
      inject: see there.

    Raises:
      ValueError: a condition that the block does not take, or an attention
        backend that cannot do this.
    """
    cfg, kernel = self.cfg, None
    if (cond is None) == (cfg.block == 'adaln'):
      raise ValueError(
        f'block={cfg.block!r} with cond={"none" if cond is None else "given"};'
        " accepted: a condition vector with block='adaln', none with 'llama' "
        '(set --config.model.block)'
      )
    if cache is None:
      kernel = self._kernel(set_ids, key_valid, padding, deterministic)
      mask = None if kernel else set_mask(set_ids, set_ids, key_valid)
      carry, at = Carry(x.astype(cfg.residual_dtype), None, None), None
    else:
      at = cache.length
      mask, cache = cache_mask(cache, set_ids, key_valid)
      carry = Carry(x.astype(cfg.residual_dtype), cache.k, cache.v)
    ada = None
    if isinstance(cond, Modulation):
      cond, ada = None, cond.ada
    elif cond is not None:
      cond = self._ada_input(cond)
    rope = None if rope is None else nl.spread_rope(rope)
    seen = key_valid if kernel else None
    shared = Shared(mask, seen, rope, at, cond, early, inject, ada)
    carry = run_layers(self, carry, shared, deterministic, kernel)
    if cache is not None:
      cache = cache.replace(k=carry.k, v=carry.v)
    return carry.x, cache

  def _kernel(self, set_ids, key_valid, padding, deterministic: bool):
    """Attention with its set ids bound, or None for `attend`."""
    cfg = self.cfg
    dropout = bool(cfg.attn_dropout) and not deterministic
    backend = choose_backend(
      cfg.attention,
      platform(),
      set_ids,
      head_dim=cfg.head_dim,
      dtype=cfg.dtype,
      dropout=dropout,
      padding=padding,
      key_valid=key_valid is not None,
    )
    if backend == 'xla':
      return None if dropout else in_parts(set_ids)
    # Pallas takes a while to import, and most runs do without it.
    from scar_jax.models.kernels import KERNELS

    return functools.partial(KERNELS[backend], set_ids=set_ids, padding=padding)

  def __call__(
    self,
    x: Float[Array, 'B L D'],
    rope: Rope | None,
    set_ids: Int[Array, ' L'],
    cache: KVCache | None = None,
    key_valid: Bool[Array, 'B L'] | None = None,
    cond: Float[Array, 'B D'] | Modulation | None = None,
    deterministic: bool = True,
    inject: Injection | None = None,
  ) -> tuple[Float[Array, 'B L D'], KVCache | None]:
    """Hidden states after the final norm.

    Args:
      x: embeddings of all positions, or of the new ones with a cache.
      rope: (cos, sin) of `layers.rope_table`, [L, K/2] or [B, L, K/2]; None
        for no rotary embedding.
      set_ids: of the positions in `x`.
      cache: takes the next L slots; the result continues it.
      key_valid: False at positions no other position may attend to.
      cond: condition of each sample for adaln blocks, or `modulate` of it.
      deterministic: False drops, with the rng 'dropout'.
      inject: the condition, of `inject.Injector`, for the positions in `x`.

    Returns:
      Hidden states and the cache (None if none was given).
    """
    x, cache = self.blocks(
      x, rope, set_ids, cache, key_valid, cond, deterministic, inject=inject
    )
    return self.final_norm(x, cond), cache
