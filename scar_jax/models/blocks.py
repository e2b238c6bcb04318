"""One transformer block: LlamaGen's, or VAR's with adaptive LayerNorm.

In: the residual stream, what is the same for all layers (`Shared`), and the
layer's number and drop-path rate. Out: the residual stream and the cache.
`decoder.py` stacks them with `nn.scan`. Source: method 3.2, 4.3, 4.4.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from scar_jax.models import layers as nl
from scar_jax.models.attention import attend, attend_slots
from scar_jax.models.cache import read_layer, write_layer
from scar_jax.models.dense import Dense
from scar_jax.models.inject import Injection
from scar_jax.models.remat import ATTENTION, LAYER_INPUT
from scar_jax.sharding import annotated, constrain, platform
from scar_jax.types import PyTree


def queries_at_once() -> int:
  """Queries of a step through a cache that attend at a time.

  The last scale of VAR at 512 pixels has 1,024, whose weights would be 270 MB
  a sample, branch and layer. CPUs take 6 to 9 % longer for 256 in two halves.
  """
  return 256 if platform() == 'cpu' else 128


class Shared(NamedTuple):
  """What every layer reads.

  Attributes:
    mask: bool [B or 1, L, S], or None where a kernel makes its own.
    key_valid: bool [B, L], False at padding; for kernels, or None.
    rope: spread (cos, sin), or None without rotary embedding.
    at: int32 first cache slot to write, or None without a cache.
    cond: AdaLN input: silu(cond) [B, D], or [B, 6, D] when shared; or None.
      With `early` there are two of it: [B, 2, ...].
    early: bool [L], positions that read the first of two; or None.
    inject: the condition of a model without a prefix, or None.
    ada: in place of `cond`, what the layers make of it: [B, layers, 6, D].
    past: cached k and v that no layer writes: see `cache.read_layer`; or None.
  """

  mask: Array | None
  key_valid: Array | None
  rope: tuple[Array, Array] | None
  at: Array | None
  cond: Array | None
  early: Array | None = None
  inject: Injection | None = None
  ada: Array | None = None
  past: tuple[Array, Array] | None = None


class Modulation(NamedTuple):
  """A condition vector and what the adaln decoder makes of it, once for all.

  Attributes:
    vector: the condition, [B, D].
    ada: gates, scales and shifts of the layers, [B, layers, 6, D].
    head: scale and shift of the final norm, [B, 2 D].
  """

  vector: Array
  ada: Array
  head: Array


class Carry(NamedTuple):
  """What goes from layer to layer: residual stream, cached k and v.

  With a past each layer has k and v of the new positions instead.
  """

  x: Array
  k: Any
  v: Any


def scaled(init: Any, *factors: tuple[slice, float]) -> Any:
  """An initialiser with blocks of the last axis multiplied."""

  def call(key: Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    value = init(key, shape, dtype)
    for part, factor in factors:
      value = value.at[..., part].multiply(factor)
    return value

  return call


def l2norm(x: Array) -> Array:
  """X / max(|x|, 1e-12) over the last axis, in float32."""
  shape, x = x.shape, nl.squeezed(x).astype(jnp.float32)
  square = jnp.sum(x * x, -1, keepdims=True)
  # The clamp sits under the root: the gradient at a zero vector stays finite.
  return (x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).reshape(shape)


def ada_std(width: int) -> float:
  """Standard deviation of VAR's initial weights."""
  return math.sqrt(1 / (3 * width))


class Attention(nn.Module):
  """Fused qkv, rotary or cosine attention, cache, output projection.

  Attributes:
    cfg: of the decoder.
    kernel: of `kernels.KERNELS`, set ids bound; None is `attend` by the mask.
  """

  cfg: Any
  kernel: Callable[..., Array] | None = None

  @nn.compact
  def __call__(
    self, x: Array, carry: Carry, shared: Shared, layer: Array, rng: Any
  ) -> tuple[Array, Carry]:
    """[B, L, D] -> the branch's output [B, L, D] and the cache."""
    cfg = self.cfg
    heads, head_dim = cfg.heads, cfg.head_dim
    ada = cfg.block == 'adaln'
    init = nn.initializers.normal(ada_std(cfg.width) if ada else cfg.init_std)
    q, k, v = Dense(
      (3, heads, head_dim),
      ('embed', None, 'heads', 'head_dim'),
      kernel_init=init,
      dtype=cfg.dtype,
      apart=True,
      name='qkv',
    )(x)
    scale = head_dim**-0.5
    if ada:
      zeros = annotated(nn.initializers.zeros, 'heads', 'head_dim')
      shape = (heads, head_dim)
      q = q + self.param('q_bias', zeros, shape).astype(q.dtype)
      v = v + self.param('v_bias', zeros, shape).astype(v.dtype)
      scale *= 0.25
      if cfg.qk_norm:
        scale = 1.0
        log_scale = self.param(
          'log_scale',
          annotated(nn.initializers.constant(math.log(4.0)), 'heads'),
          (heads,),
        )
        factor = jnp.exp(jnp.minimum(log_scale, math.log(100.0)))
        q = (l2norm(q) * factor[:, None]).astype(q.dtype)
        k = l2norm(k).astype(k.dtype)
    if shared.rope is not None:
      q, k = nl.rotate(q, *shared.rope), nl.rotate(k, *shared.rope)
    q = constrain(q, 'batch', 'length', 'act_heads', 'head_dim')
    k = constrain(k, 'batch', 'length', 'act_heads', 'head_dim')
    v = constrain(v, 'batch', 'length', 'act_heads', 'head_dim')
    if shared.at is not None:
      place = layer, shared.at, shared.mask.shape[-1]
      put = read_layer if shared.past else write_layer
      held_k, held_v = shared.past or (carry.k, carry.v)
      k_all, k = put(held_k, k, *place)
      v_all, v = put(held_v, v, *place)
      carry = carry._replace(k=k_all, v=v_all)
      out = attend_slots(q, k, v, shared.mask, scale, queries_at_once())
    else:
      # For `scar inspect`; nothing is kept unless it is asked for.
      self.sow('intermediates', 'qk', (q * scale, k))
      if self.kernel is not None:
        out = self.kernel(q, k, v, scale, shared.key_valid)
      else:
        out = attend(q, k, v, shared.mask, scale, cfg.attn_dropout, rng)
        out = checkpoint_name(out, ATTENTION)
    out = Dense(
      (cfg.width,),
      ('heads', 'head_dim', 'embed'),
      in_dims=2,
      use_bias=ada,
      kernel_init=_residual_init(cfg, init) if ada else init,
      dtype=cfg.dtype,
      name='out',
    )(out)
    return out, carry


def _residual_init(cfg: Any, init: Any) -> Any:
  return scaled(init, (slice(None), 1 / math.sqrt(2 * cfg.layers)))


def _entering(carry: Carry, layer: Array, shared: Shared) -> Carry:
  """What a layer starts from: its input, and what is injected there."""
  x = checkpoint_name(carry.x, LAYER_INPUT)
  if shared.inject is not None:
    x = shared.inject(x, layer, shared.rope)
  return carry._replace(x=x)


def _leaving(carry: Carry, shared: Shared) -> tuple[Carry, Any]:
  """What goes to the next layer; with a past, this one's k and v apart."""
  if shared.past is None:
    return carry, None
  return Carry(carry.x, None, None), (carry.k, carry.v)


class LlamaBlock(nn.Module):
  """x + Attn(RMSNorm x), then + SwiGLU(RMSNorm x)."""

  cfg: Any
  deterministic: bool = True
  kernel: Callable[..., Array] | None = None

  @nn.compact
  def __call__(
    self, carry: Carry, layer: Array, path_rate: Array, shared: Shared
  ) -> tuple[Carry, Any]:
    """One layer; what `nn.scan` stacks is of `_leaving`."""
    cfg = self.cfg
    keys = _keys(self, cfg)
    carry = _entering(carry, layer, shared)
    normed = nl.RMSNorm(cfg.norm_eps, cfg.dtype, name='attn_norm')(carry.x)
    h, carry = Attention(cfg, self.kernel, name='attn')(
      normed, carry, shared, layer, keys[0]
    )
    x = _add(cfg, carry.x, h, cfg.resid_dropout, path_rate, keys[1], keys[2])
    normed = nl.RMSNorm(cfg.norm_eps, cfg.dtype, name='ffn_norm')(x)
    h = nl.SwiGLU(
      cfg.hidden, nn.initializers.normal(cfg.init_std), cfg.dtype, name='ffn'
    )(normed)
    x = _add(cfg, x, h, cfg.ffn_dropout, path_rate, keys[3], keys[4])
    self.sow('intermediates', 'block', x)
    return _leaving(carry._replace(x=x), shared)


class AdaLNBlock(nn.Module):
  """VAR's block: both branches shifted, scaled and gated by the condition."""

  cfg: Any
  deterministic: bool = True
  kernel: Callable[..., Array] | None = None

  @nn.compact
  def __call__(
    self, carry: Carry, layer: Array, path_rate: Array, shared: Shared
  ) -> tuple[Carry, Any]:
    """One layer; what `nn.scan` stacks is of `_leaving`."""
    cfg, width = self.cfg, self.cfg.width
    std = ada_std(width)
    keys = _keys(self, cfg)
    carry = _entering(carry, layer, shared)
    if shared.ada is not None:
      ada = shared.ada[:, layer]
    elif cfg.shared_ada:
      # N(0, 1) / sqrt(C), then the same factors as the per-block projection.
      init = nn.initializers.normal(width**-0.5)
      own = self.param(
        'ada_bias',
        annotated(_ada_rows(init, cfg.ada_gate), None, 'embed'),
        (6, width),
      )
      ada = shared.cond + own[None]
    else:
      ada = _ada_dense(cfg, name='ada')(shared.cond)
      ada = ada.reshape(*shared.cond.shape[:-1], 6, width)
    length = carry.x.shape[1]
    gate1, gate2, scale1, scale2, shift1, shift2 = (
      by_position(ada[..., i, :], shared.early, length).astype(cfg.dtype)
      for i in range(6)
    )

    normed = nl.layer_norm(carry.x, cfg.norm_eps).astype(cfg.dtype)
    h, carry = Attention(cfg, self.kernel, name='attn')(
      normed * (1 + scale1) + shift1, carry, shared, layer, keys[0]
    )
    h = gate1 * nl.dropout(h, cfg.resid_dropout, keys[1])
    x = _add(cfg, carry.x, h, 0.0, path_rate, None, keys[2])
    normed = nl.layer_norm(x, cfg.norm_eps).astype(cfg.dtype)
    init = nn.initializers.normal(std)
    h = nl.GeluMLP(
      cfg.hidden,
      width,
      kernel_init=init,
      out_init=_residual_init(cfg, init),
      dtype=cfg.dtype,
      name='ffn',
    )(normed * (1 + scale2) + shift2)
    h = gate2 * nl.dropout(h, cfg.ffn_dropout, keys[3])
    x = _add(cfg, x, h, 0.0, path_rate, None, keys[4])
    self.sow('intermediates', 'block', x)
    return _leaving(carry._replace(x=x), shared)


def _ada_dense(cfg: Any, **where: Any) -> Dense:
  """The condition to 6 D: gates, scales, shifts of the two branches."""
  width = cfg.width
  init = nn.initializers.normal(ada_std(width))
  gates, rest = slice(0, 2 * width), slice(2 * width, None)
  return Dense(
    (6 * width,),
    ('embed', 'mlp'),
    use_bias=True,
    kernel_init=scaled(init, (gates, cfg.ada_gate), (rest, 0.5)),
    dtype=cfg.dtype,
    **where,
  )


def ada_of_layers(cfg: Any, layers: PyTree, cond: Array) -> Array:
  """What each layer of the adaln decoder makes of a condition.

  Args:
    cfg: of the decoder.
    layers: stacked parameters of the layers.
    cond: as in `Shared`.

  Returns:
    [B, layers, 6, D].
  """
  if cfg.shared_ada:
    return cond[:, None] + jnp.asarray(layers['ada_bias'])[None]
  dense = _ada_dense(cfg, parent=None)
  # A condition for each layer: with one for all of them, CPUs copy all kernels
  # into a single one, which takes 8 times as long as the products.
  count = jax.tree.leaves(layers)[0].shape[0]
  ada = jax.vmap(lambda p, c: dense.apply({'params': p}, c), out_axes=1)(
    layers['ada'], jnp.broadcast_to(cond, (count, *cond.shape))
  )
  return ada.reshape(*ada.shape[:2], 6, cfg.width)


def by_position(vectors: Array, early: Array | None, length: int) -> jax.Array:
  """What each position is modulated by, [B, 1 or L, D].

  Args:
    vectors: [B, D]; with `early` [B, 2, D].
    early: bool [L], positions that read the first of the two.
    length: L.
  """
  if early is not None:
    return jnp.where(early[:, None], vectors[:, :1], vectors[:, 1:])
  if len(vectors) > 1:
    return vectors[:, None]
  # Its gradient is then summed over both axes: over positions alone takes CPUs
  # ten times as long.
  shape = (1, length, vectors.shape[-1])
  return jax.lax.broadcast_in_dim(vectors[0], shape, (2,))


def _ada_rows(init: Any, gate: float) -> Any:
  def call(key: Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    rows = jnp.array([gate, gate, 0.5, 0.5, 0.5, 0.5], dtype)
    return init(key, shape, dtype) * rows[:, None]

  return call


def _keys(block: Any, cfg: Any) -> list[Any]:
  """Keys of attention, residual, path, FFN and second path; None where off."""
  rates = (
    cfg.attn_dropout,
    cfg.resid_dropout,
    cfg.drop_path,
    cfg.ffn_dropout,
    cfg.drop_path,
  )
  off = block.deterministic
  return [None if off or not r else block.make_rng('dropout') for r in rates]


def _add(
  cfg: Any,
  x: Array,
  branch: Array,
  rate: float,
  path_rate: Array,
  key: Any,
  path_key: Any,
) -> Array:
  """Residual sum, in the residual type."""
  branch = nl.dropout(branch, rate, key)
  branch = nl.drop_path(branch, path_rate, path_key)
  x = x + branch.astype(x.dtype)
  # Between matrix products each position stands alone, so that the tensor
  # axis may split the sequence where heads and hidden units are whole.
  length = 'act_length' if cfg.shard_length else 'length'
  return constrain(x, 'batch', length, 'act_embed')
