"""Attention under a bool mask, and the choice of a backend.

In: q, k, v `[B, L, H, K]`, or keys and values as `cache.py` has them, and a
bool mask `[B or 1, Lq, S]` from `orders.layout.set_mask`. Out: `[B, Lq, H, K]`.
Whole sequences may go through `kernels.py` instead; `choose_backend` says when.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models.remat import ATTENTION
from scar_jax.orders.layout import set_mask
from scar_jax.sharding import platform

BACKENDS = ('auto', 'xla', 'splash', 'cudnn')
# Shorter sequences gain nothing from parts, nor do parts from fewer rows.
_SHORTEST, _FEWEST_ROWS = 512, 64


def attend(
  q: Float[Array, 'B L H K'],
  k: Float[Array, 'B S H K'],
  v: Float[Array, 'B S H K'],
  mask: Bool[Array, '_ L S'],
  scale: float | None = None,
  dropout: float = 0.0,
  rng: Array | None = None,
) -> Float[Array, 'B L H K']:
  """Softmax attention under a mask; logits and softmax in float32.

  Args:
    q: queries.
    k: keys.
    v: values.
    mask: True where a query may attend; leading axis B or 1.
    scale: of the logits, K**-0.5 by default.
    dropout: rate on the attention weights, needs `rng`.
    rng: a PRNG key; None for no dropout.
  """
  factor = q.shape[-1] ** -0.5 if scale is None else scale
  # Heads first: a batch of plain matrix products, 4 times faster on CPUs.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  out = _attend(q, k, v, mask[:, None], factor, dropout, rng)
  return out.transpose(0, 2, 1, 3)


def part_ends(set_ids: Int[np.ndarray, ' L']) -> tuple[int, ...]:
  """Where the parts of a sequence end: none sees a key after its own rows.

  Parts end where a set does, and a row sees no set after its own: eight parts
  of a causal sequence have 56 % of its pairs, four of VAR's ten scales 64 %.
  Up to eight, since each has products of its own; () for short sequences, for
  those of which that leaves more than 80 %, and where set ids fall.
  """
  length = len(set_ids)
  if length < _SHORTEST or np.any(np.diff(set_ids) < 0):
    return ()
  ends = np.searchsorted(set_ids, set_ids, side='right')
  parts = [0]
  for end in np.unique(ends).tolist():
    if end - parts[-1] >= max(length / 8, _FEWEST_ROWS) or end == length:
      parts.append(end)
  pairs = sum((end - first) * end for first, end in itertools.pairwise(parts))
  return tuple(parts[1:]) if pairs <= 0.8 * length**2 else ()


def in_parts(set_ids: Any) -> Callable[..., jax.Array] | None:
  """`attend_in_parts` of a sequence, on CPUs and where it saves something."""
  if platform() != 'cpu' or not isinstance(set_ids, np.ndarray):
    return None
  ends = part_ends(set_ids)
  if not ends:
    return None
  return functools.partial(attend_in_parts, set_ids=set_ids, ends=ends)


def attend_in_parts(
  q: Float[Array, 'B L H K'],
  k: Float[Array, 'B L H K'],
  v: Float[Array, 'B L H K'],
  scale: float,
  key_valid: Bool[Array, 'B L'] | None,
  *,
  set_ids: Int[np.ndarray, ' L'],
  ends: tuple[int, ...],
) -> Float[Array, 'B L H K']:
  """`attend` under `set_mask`, without the keys that no row of a part sees.

  Args:
    q: queries.
    k: keys.
    v: values.
    scale: of the logits.
    key_valid: False at keys hidden from all but themselves.
    set_ids: of the sequence.
    ends: of its parts, see `part_ends`.
  """
  # Heads first, see `attend`: once for all parts.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  outs = []
  for first, end in itertools.pairwise((0, *ends)):
    valid = None if key_valid is None else key_valid[:, :end]
    mask = set_mask(set_ids[first:end], set_ids[:end], valid, first)[:, None]
    some = q[:, :, first:end], k[:, :, :end], v[:, :, :end]
    outs.append(_attend(*some, mask, scale))
  out = jnp.concatenate(outs, axis=2).transpose(0, 2, 1, 3)
  return checkpoint_name(out, ATTENTION)


def attend_slots(
  q: Float[Array, 'B L H K'],
  k: Float[Array, 'B H K S'],
  v: Float[Array, 'B H K S'],
  mask: Bool[Array, '_ L S'],
  scale: float,
  block: int = 0,
) -> Float[Array, 'B L H K']:
  """`attend` to what `write_layer` returns.

  Args:
    q: queries.
    k: keys.
    v: values.
    mask: True where a query may attend; leading axis B or 1.
    scale: of the logits.
    block: at most that many queries at a time, so that the weights of all are
      never in memory; 0 is all at once.
  """

  def some(part: tuple[jax.Array, jax.Array]) -> jax.Array:
    q, mask = part
    return weighted(_logits(q, k, mask, scale, 'bhks'), v, 'bhks')[0]

  q, mask = q.transpose(0, 2, 1, 3), mask[:, None]
  length = q.shape[2]
  if 0 < block < length:
    # Equal ones, so that 130 queries do not become 256; 8 rows are a tile.
    each = -(-length // -(-length // block))
    block = min(block, -(-each // 8) * 8)
    parts = jax.lax.map(some, (_blocks(q, block), _blocks(mask, block)))
    out = _joined(parts)[:, :, :length]
  else:
    out = some((q, mask))
  return out.transpose(0, 2, 1, 3)


def _blocks(x: Array, size: int) -> jax.Array:
  """[B, H, L, X] -> [count, B, H, size, X], the last one filled with zeros."""
  rest = -x.shape[2] % size
  x = jnp.pad(x, ((0, 0), (0, 0), (0, rest), (0, 0)))
  x = x.reshape(*x.shape[:2], -1, size, x.shape[-1])
  return jnp.moveaxis(x, 2, 0)


def _joined(x: jax.Array) -> jax.Array:
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _attend(q, k, v, mask, factor, dropout=0.0, rng=None):
  """Heads first: [B, H, L, K] and a mask [_, 1, L, S]."""
  drops = dropout and rng is not None
  if platform() == 'cpu' and not drops:
    return _cpu_attend(q, k, v, mask, factor)
  weights = jax.nn.softmax(_logits(q, k, mask, factor), axis=-1)
  if drops:
    keep = jax.random.bernoulli(rng, 1.0 - dropout, weights.shape)
    weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
  return jnp.einsum('bhls,bhsk->bhlk', weights.astype(v.dtype), v)


def _logits(
  q: jax.Array, k: jax.Array, mask: Array, factor: float, keys: str = 'bhsk'
) -> jax.Array:
  """Masked logits [B, H, L, S]; `keys` names the axes of `k`."""
  logits = jnp.einsum(
    f'bhlk,{keys}->bhls', q, k, preferred_element_type=jnp.float32
  )
  return jnp.where(mask, logits * factor, jnp.finfo(jnp.float32).min)


def weighted(
  logits: jax.Array, v: jax.Array, values: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Values under the softmax of logits, its maximum and its sum.

  Divided by the sum afterwards: K channels a query, not S weights.

  Args:
    logits: float32 [B, H, L, S].
    v: values.
    values: names of their axes.
  """
  # What is taken off changes nothing, so that no gradient goes through it.
  top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
  weights = jnp.exp(logits - top)
  total = jnp.sum(weights, -1, keepdims=True)
  out = jnp.einsum(
    f'bhls,{values}->bhlk',
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return (out / total).astype(v.dtype), top, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cpu_attend(
  q: Float[Array, 'B H L K'],
  k: Float[Array, 'B H S K'],
  v: Float[Array, 'B H S K'],
  mask: Bool[Array, '_ 1 L S'],
  factor: float,
) -> Float[Array, 'B H L K']:
  """Attention whose backward pass computes the weights again.

  To keep them, [B, H, L, S] for each layer, and to fetch them takes a CPU
  longer. Where layers are written out, XLA keeps the logits, which both passes
  need, instead of computing them twice; that is as fast.

  Source: the backward pass of Dao-AILab/flash-attention, untiled.
  """
  return _cpu_forward(q, k, v, mask, factor)[0]


def _cpu_forward(q, k, v, mask, factor):
  # Queries are scaled where logits would be: K values each, not S.
  q = q * factor
  out, top, total = weighted(_logits(q, k, mask, 1.0), v, 'bhsk')
  return out, (q, k, v, mask, out, top, jnp.log(total))


def _cpu_backward(factor, kept, g):
  q, k, v, mask, out, top, log_total = kept
  # The exponential last: what comes after it would be done for each reader.
  weights = jnp.exp(_logits(q, k, mask, 1.0) - top - log_total)
  wide = jnp.float32
  along = jnp.einsum('bhlk,bhsk->bhls', g, v, preferred_element_type=wide)
  # The softmax's own sum over keys, from `out`: K channels instead of S.
  mean = jnp.sum((g * out).astype(jnp.float32), -1, keepdims=True)
  # A row that may attend to nothing has weights, and no gradient.
  pull = jnp.where(mask, weights * (along - mean), 0.0)
  toward = jnp.einsum(
    'bhls,bhsk->bhlk', pull.astype(q.dtype), k, preferred_element_type=wide
  )
  # Sums over rows, which CPUs take in float32 only.
  grads = (
    toward * factor,
    jnp.einsum('bhls,bhlk->bhsk', pull, q.astype(wide)),
    jnp.einsum('bhls,bhlk->bhsk', weights, g.astype(wide)),
  )
  return *(x.astype(g.dtype) for x in grads), None


_cpu_attend.defvjp(_cpu_forward, _cpu_backward)


def choose_backend(
  wanted: str,
  platform: str,
  set_ids: Any,
  *,
  head_dim: int,
  dtype: str,
  dropout: bool = False,
  padding: tuple[int, int] | None = None,
  key_valid: bool = False,
) -> str:
  """The backend of a pass over a whole sequence, 'xla', 'splash' or 'cudnn'.

  Steps through a cache do not ask: they always run on 'xla'.

  Args:
    wanted: a value of `BACKENDS`. 'auto' is 'splash' on TPUs wherever that
      can do it, from one tile of 128 positions on, and 'xla' elsewhere.
    platform: 'tpu', 'gpu' or 'cpu'. On a CPU the kernel is interpreted.
    set_ids: of the sequence; kernels need them static, so as numpy.
    head_dim: K.
    dtype: of q, k and v.
    dropout: attention weights are dropped.
    padding: positions outside of which every key is valid, if known.
    key_valid: some keys may be padding.

  Raises:
    ValueError: `wanted` cannot do it; says why.
  """
  if wanted == 'xla':
    return 'xla'
  static = isinstance(set_ids, np.ndarray)
  named = 'splash' if wanted == 'auto' else wanted
  platforms = {'splash': ('tpu', 'cpu'), 'cudnn': ('gpu',)}[named]
  problems = [
    (platform not in platforms, f'it runs on {platforms[0]}, not {platform}'),
    (not static, 'set ids that are traced; it needs them as a numpy array'),
    (dropout, 'attention dropout (set --config.model.attn_dropout=0)'),
  ]
  if named == 'splash':
    problems += [
      (
        static and bool(np.any(np.diff(set_ids) < 0)),
        'set ids that fall along the sequence',
      ),
      (key_valid and padding is None, 'padding at unknown positions'),
    ]
  else:
    problems += [
      (dtype == 'float32', 'float32 (set --config.model.dtype=bfloat16)'),
      (
        head_dim % 8 or head_dim > 128,
        f'heads of {head_dim} channels, where multiples of 8 up to 128 work',
      ),
    ]
  found = [text for wrong, text in problems if wrong]
  if wanted == 'auto':
    small = len(set_ids) < 128
    return 'xla' if found or small or platform != 'tpu' else 'splash'
  if found:
    raise ValueError(
      f'attention={wanted!r} cannot run this model here: {"; ".join(found)}; '
      'accepted: auto, xla (set --config.model.attention)'
    )
  return wanted
