"""Keeping a codebook in use: usage statistics, k-means start, dead codes.

In: ids and latents of a batch, the usage state of the run. Out: new states and
codebooks, by pure functions that compile into the training step. The state is
a dict of arrays in the train state's `extra`:

  step   int32 []      optimiser steps done
  count  float32 [V]   decayed number of uses
  idle   int32 [V]     batches since the last use
  pool   float32 [Q, C] distinct latents of the last batches, newest first
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models.tokenizers.vq import normalize

# Batches whose latents the pool holds; each leaves as many as there are codes.
_POOL_BATCHES = 16
_CHUNK = 4096  # latents compared with all codes at a time
Usage = dict[str, jax.Array]


def init_usage(codes: int, code_dim: int) -> Usage:
  """The state before the first step."""
  return {
    'step': jnp.zeros((), jnp.int32),
    'count': jnp.zeros(codes, jnp.float32),
    'idle': jnp.zeros(codes, jnp.int32),
    'pool': jnp.zeros((_POOL_BATCHES * codes, code_dim), jnp.float32),
  }


def update_usage(
  usage: Usage,
  ids: Int[Array, 'B *n'],
  latent: Float[Array, 'B *n C'],
  valid: Bool[Array, ' B'] | None,
  rng: Array,
  window: int,
) -> Usage:
  """Counts one batch and puts some of its latents into the pool.

  Args:
    usage: state before.
    ids: codes used.
    latent: what each id was chosen for, in the space of the codes.
    valid: samples that count; without any, counts only decay.
    rng: for the draw (with replacement, valid positions only).
    window: batches; the counts decay by `1 - 1/window`.
  """
  flat = ids.reshape(-1)
  mask = jnp.ones(ids.shape, jnp.float32)
  if valid is not None:
    valid = valid.reshape(-1, *[1] * (ids.ndim - 1))
    mask = mask * valid.astype(jnp.float32)
  mask = mask.reshape(-1)
  hits = jnp.zeros_like(usage['count']).at[flat].add(mask)
  latents = jax.lax.stop_gradient(latent).reshape(flat.size, -1)
  latents = latents.astype(jnp.float32)
  ends = jnp.cumsum(mask * _first_of_equals(latents, mask))
  draws = jax.random.uniform(rng, usage['count'].shape) * ends[-1]
  rows = jnp.searchsorted(ends, draws, side='right')
  new = latents[jnp.minimum(rows, flat.size - 1)]
  pool = jnp.concatenate([new, usage['pool'][: -len(new)]])
  full = jnp.tile(new, (_POOL_BATCHES, 1))  # until there is more
  return {
    **usage,
    'count': usage['count'] * (1 - 1 / window) + hits,
    'idle': jnp.where(hits > 0, 0, usage['idle'] + 1),
    'pool': jnp.where(usage['step'] == 0, full, pool),
  }


def _first_of_equals(
  x: Float[Array, 'n C'], mask: Float[Array, ' n']
) -> Float[Array, ' n']:
  """1 at one of each set of equal rows, 0 at the others; masked rows last.

  A drawing has few kinds of patches, and most of them are white: a codebook
  made from as many of each as there are would hold little else. Rows are told
  apart by their product with one random direction.
  """
  keys = x @ jax.random.normal(jax.random.key(0), x.shape[1:])
  least = 1e-5 * jnp.std(keys) + 1e-12
  keys = jnp.where(mask > 0, keys, jnp.inf)
  order = jnp.argsort(keys)
  apart = jnp.diff(keys[order], prepend=-jnp.inf) > least
  return jnp.zeros(len(x)).at[order].set(apart.astype(jnp.float32))


def usage_metrics(usage: Usage, window: int) -> dict[str, Float[Array, '']]:
  """`code_usage` (share used within the window) and `code_perplexity`."""
  used = (usage['idle'] < window) & (usage['count'] > 0)
  p = usage['count'] / jnp.maximum(jnp.sum(usage['count']), 1e-9)
  entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-12)))
  return {
    'code_usage': jnp.mean(used.astype(jnp.float32)),
    'code_perplexity': jnp.exp(entropy),
  }


def revive(
  codes: Float[Array, 'V C'],
  usage: Usage,
  dead_after: int,
  live: Bool[Array, ''],
  rng: Array,
) -> tuple[Float[Array, 'V C'], Usage]:
  """Moves codes that no batch used for `dead_after` steps onto latents.

  A latent is taken the likelier the farther it lies from all codes: pictures
  are full of equal patches, whose latents have their code already.

  Args:
    codes: the raw codebook.
    usage: with the pool of this step's batch.
    dead_after: steps.
    live: False changes nothing but keeps codes from counting as idle.
    rng: picks which latent each dead code takes.
  """
  pool = usage['pool'][: len(codes)]  # of this batch
  gap, _ = _nearest(pool, codes)
  score = jnp.log(gap + 1e-12) + jax.random.gumbel(rng, gap.shape)
  picks = jnp.argsort(-score)
  # The farthest latents go to dead codes, in order.
  dead = (usage['idle'] >= dead_after) & live
  turn = jnp.maximum(jnp.cumsum(dead) - 1, 0)
  codes = jnp.where(dead[:, None], pool[picks[turn]], codes)
  idle = jnp.where(dead | ~live, 0, usage['idle'])
  return codes, {**usage, 'idle': idle}


def _nearest(
  x: Float[Array, 'Q C'], codes: Float[Array, 'V C']
) -> tuple[Float[Array, ' Q'], Int[Array, ' Q']]:
  """Squared distance to the nearest code, and which one that is."""
  norms = jnp.sum(jnp.square(codes), -1)

  def one(row: jax.Array) -> tuple[jax.Array, jax.Array]:
    gaps = norms - 2 * codes @ row
    gap = jnp.min(gaps) + jnp.sum(jnp.square(row))
    return jnp.maximum(gap, 0.0), jnp.argmin(gaps)

  return jax.lax.map(one, x, batch_size=_CHUNK)


def kmeans(
  pool: Float[Array, 'Q C'],
  codes: int,
  iters: int,
  l2_norm: bool,
  rng: Array,
) -> Float[Array, 'V C']:
  """Lloyd's algorithm from random latents.

  An empty cluster moves to one of the latents farthest from all centres, so
  that equal latents (white patches) do not keep many codes.

  Args:
    pool: latents, more than `codes`.
    codes: clusters.
    iters: rounds.
    l2_norm: centres are brought back to unit length.
    rng: picks the first centres.
  """
  picks = jax.random.permutation(rng, pool.shape[0])[:codes]

  def body(_: int, centres: jax.Array) -> jax.Array:
    gap, nearest = _nearest(pool, centres)
    total = jnp.zeros_like(centres).at[nearest].add(pool)
    number = jnp.zeros(codes).at[nearest].add(1.0)
    empty = number == 0
    far = pool[jnp.argsort(-gap)[jnp.maximum(jnp.cumsum(empty) - 1, 0)]]
    mean = total / jnp.maximum(number, 1.0)[:, None]
    mean = jnp.where(empty[:, None], far, mean)
    return normalize(mean) if l2_norm else mean

  return jax.lax.fori_loop(0, iters, body, pool[picks])
