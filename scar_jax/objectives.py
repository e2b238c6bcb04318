"""Every training loss, as pure functions of arrays in float32.

In: predictions, targets and an optional per-sample `valid` mask (False rows
carry no loss). Out: a float32 scalar, or a scalar and a dict of metrics.
Called by the tasks in `train/tasks`; nothing here owns a parameter.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from scar_jax.sharding import logical_spec

Metrics = dict[str, jax.Array]


def masked_mean(
  values: Float[Array, '...'], valid: Bool[Array, '...'] | None = None
) -> Float[Array, '']:
  """Mean over the entries whose leading axes `valid` keeps.

  Args:
    values: any shape.
    valid: mask over the leading axes of `values`, or None for all of them.

  Returns:
    Sum of the kept entries over their number, which counts as at least 1; a
    batch without a valid entry gives 0.

  Raises:
    ValueError: the shape of `valid` is not a leading part of that of `values`.
  """
  values = values.astype(jnp.float32)
  if valid is None:
    return jnp.mean(values)
  if values.shape[: valid.ndim] != valid.shape:
    raise ValueError(
      f'valid has shape {valid.shape}, accepted: leading axes of '
      f'{values.shape} (set the batch field `valid`)'
    )
  mask = valid.reshape(valid.shape + (1,) * (values.ndim - valid.ndim)) != 0
  # where, not a product: an unusable row may hold infinities.
  total = jnp.sum(jnp.where(mask, values, 0.0))
  per_entry = values.size // max(valid.size, 1)
  count = jnp.sum(mask.astype(jnp.float32)) * per_entry
  return total / jnp.maximum(count, 1.0)


class TokenLosses(NamedTuple):
  """Of each target token, float32.

  Attributes:
    nll: negative log-likelihood, natural log.
    hit: 1 where the arg-max is the target (the first one, of equal logits).
  """

  nll: Float[Array, 'B N']
  hit: Float[Array, 'B N']


def token_losses(
  logits: Float[Array, 'B N V'],
  targets: Int[Array, 'B N'],
  vocab_axis: str | None = None,
) -> TokenLosses:
  """Cross-entropy and hits of each token.

  Only sums and maxima over the vocabulary, no gather: so it splits over
  devices, and the gradient is one dense pass.

  Args:
    logits: one row per target token.
    targets: token ids.
    vocab_axis: inside `shard_map`, the mesh axis over which V is split.

  Raises:
    ValueError: logits and targets disagree in their leading shape.
  """
  if logits.shape[:-1] != targets.shape:
    raise ValueError(
      f'logits {logits.shape} do not fit targets {targets.shape}; '
      'accepted: [B, N, V] with [B, N] (see the order layout)'
    )

  def over_shards(reduce: Callable[..., Array], x: Array) -> Array:
    return reduce(x, vocab_axis) if vocab_axis else x

  logits = logits.astype(jnp.float32)
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  if vocab_axis:
    ids += logits.shape[-1] * jax.lax.axis_index(vocab_axis)
  known = jax.lax.stop_gradient(logits)
  top = over_shards(jax.lax.pmax, jnp.max(known, axis=-1, keepdims=True))
  # Of equal logits the first is the guess. A sum like those below, so that all
  # of them are one pass over the logits.
  before = (known >= top) & (ids < targets[..., None])
  before = jnp.sum(before.astype(jnp.float32), axis=-1)
  before = over_shards(jax.lax.psum, before)
  highest = top[..., 0]
  # Rows of infinities belong to samples that do not count.
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  total = jnp.sum(jnp.exp(logits - top), axis=-1)
  total = over_shards(jax.lax.psum, total)
  picked = jnp.where(ids == targets[..., None], logits, 0.0)
  picked = over_shards(jax.lax.psum, jnp.sum(picked, axis=-1))
  return TokenLosses(
    jnp.log(total) + top[..., 0] - picked,
    ((picked >= highest) & (before == 0)).astype(jnp.float32),
  )


def chunked_token_losses(
  hidden: Float[Array, 'B N D'],
  head: Mapping[str, Array],
  targets: Int[Array, 'B N'],
  chunk: int,
  dtype: str = 'float32',
) -> TokenLosses:
  """`token_losses` of `hidden @ kernel + bias`, a few positions at a time.

  The logits of `chunk` positions of each sample exist at once, and again in
  the backward pass. On a mesh each device has its rows of the batch and its
  part of the vocabulary; the kernel is gathered over `fsdp` once, and its
  gradient, summed over chunks in float32, is scattered once.

  Args:
    hidden: states that predict the targets.
    head: `kernel` [D, V], axes `embed` and `vocab`, and perhaps `bias` [V].
    targets: token ids.
    chunk: positions; at least 1.
    dtype: of the matrix product; its result is float32.
  """
  kernel, bias = head['kernel'], head.get('bias', jnp.zeros(()))
  mesh = jax.sharding.get_abstract_mesh()
  places = {} if mesh.empty else dict(mesh.shape)
  rows = logical_spec(('batch', None), targets.shape, places)
  table = logical_spec(('embed', 'vocab'), kernel.shape, places)
  # A batch that the mesh does not divide is whole on each device: leave it,
  # and the rest, to the compiler.
  split = rows[0] is not None
  embed, vocab = table if split else (None, None)

  def local(hidden, kernel, bias, targets) -> tuple[Array, Array]:
    kernel = kernel.astype(dtype)
    if embed:
      kernel = jax.lax.all_gather(kernel, embed, axis=0, tiled=True)
    kernel = kernel.astype(jnp.float32)

    @jax.checkpoint
    def body(part: tuple[Array, Array]) -> TokenLosses:
      logits = jax.lax.dot_general(
        part[0].astype(dtype),
        kernel.astype(dtype),
        (((2,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      )
      return token_losses(logits + bias, part[1], vocab)

    parts = jax.tree.map(lambda x: _cut(x, chunk), (hidden, targets))
    found = jax.lax.map(body, parts)
    nll, hit = (_joined(x, targets.shape) for x in found)
    return nll, hit

  if split:
    states = PartitionSpec(*rows, None)
    flat = PartitionSpec(vocab) if bias.ndim else PartitionSpec()
    local = jax.shard_map(
      local,
      in_specs=(states, table, flat, rows),
      out_specs=(rows, rows),
    )
  return TokenLosses(*local(hidden, kernel, bias, targets))


def _cut(x: Float[Array, 'B N *d'], chunk: int) -> Float[Array, 'n B chunk *d']:
  """Chunks of the second axis, the last one padded with zeros."""
  pad = -x.shape[1] % chunk
  x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
  return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _joined(
  parts: Float[Array, 'n B chunk'], shape: tuple[int, ...]
) -> Float[Array, 'B N']:
  return parts.swapaxes(0, 1).reshape(shape[0], -1)[:, : shape[1]]


def mean_losses(
  tokens: TokenLosses,
  valid: Bool[Array, ' B'] | Bool[Array, 'B N'] | None = None,
) -> tuple[Float[Array, ''], Metrics]:
  """Mean cross-entropy, and `ce`, `accuracy` and `perplexity`.

  Args:
    tokens: of `token_losses`.
    valid: samples or single tokens that count.
  """
  loss = masked_mean(tokens.nll, valid)
  # Early losses can exceed what exp holds in float32.
  perplexity = jnp.exp(jnp.minimum(loss, 80.0))
  return loss, {
    'ce': loss,
    'accuracy': masked_mean(tokens.hit, valid),
    'perplexity': perplexity,
  }


def cross_entropy(
  logits: Float[Array, 'B N V'],
  targets: Int[Array, 'B N'],
  valid: Bool[Array, ' B'] | Bool[Array, 'B N'] | None = None,
) -> tuple[Float[Array, ''], Metrics]:
  """Mean token cross-entropy (FoundationVision/LlamaGen), natural log.

  Args:
    logits: one row per target token.
    targets: token ids.
    valid: samples or single tokens that count.

  Returns:
    The loss and `ce`, `accuracy` (share of arg-max hits) and `perplexity`.

  Raises:
    ValueError: logits and targets disagree in their leading shape.
  """
  return mean_losses(token_losses(logits, targets), valid)


def preservation(
  restored: Float[Array, 'B h w d'],
  features: Float[Array, 'B h w d'],
  valid: Bool[Array, ' B'] | None = None,
) -> Float[Array, '']:
  """Mean squared error of restored against frozen features (SCAR, L_pres)."""
  features = jax.lax.stop_gradient(features.astype(jnp.float32))
  return masked_mean(jnp.square(restored.astype(jnp.float32) - features), valid)


def alignment(
  hidden: Float[Array, 'B P D'],
  target: Float[Array, 'B P D'],
  stop_target_grad: bool = False,
  valid: Bool[Array, ' B'] | None = None,
) -> tuple[Float[Array, ''], Metrics]:
  """Mean squared error of prefix states against target tokens (SCAR, L_align).

  Args:
    hidden: final hidden states at the prefix positions.
    target: projected compressed features of the target image.
    stop_target_grad: the official code lets gradients flow into `target`;
      True keeps the compressor from meeting the states half way.
    valid: samples that count.

  Returns:
    The loss and `target_std` and `align_cosine`, which show a collapse.
  """
  hidden = hidden.astype(jnp.float32)
  target = target.astype(jnp.float32)
  if stop_target_grad:
    target = jax.lax.stop_gradient(target)
  loss = masked_mean(jnp.square(hidden - target), valid)
  norms = jnp.linalg.norm(hidden, axis=-1) * jnp.linalg.norm(target, axis=-1)
  cosine = jnp.sum(hidden * target, axis=-1) / jnp.maximum(norms, 1e-8)
  mean_D = jnp.mean(target, axis=(0, 1))
  metrics = {
    'target_std': jnp.sqrt(masked_mean(jnp.square(target - mean_D), valid)),
    'align_cosine': masked_mean(cosine, valid),
  }
  return loss, jax.lax.stop_gradient(metrics)


def codebook_loss(
  latent: Float[Array, 'B h w C'],
  codes: Float[Array, 'B h w C'],
  valid: Bool[Array, ' B'] | None = None,
) -> Float[Array, '']:
  """`mean((codes - sg(latent))^2)`: moves codes to their latents."""
  return masked_mean(jnp.square(codes - jax.lax.stop_gradient(latent)), valid)


def commitment_loss(
  latent: Float[Array, 'B h w C'],
  codes: Float[Array, 'B h w C'],
  beta: float = 0.25,
  valid: Bool[Array, ' B'] | None = None,
) -> Float[Array, '']:
  """`beta * mean((sg(codes) - latent)^2)`: keeps latents near their codes."""
  gap = jnp.square(jax.lax.stop_gradient(codes) - latent)
  return beta * masked_mean(gap, valid)


def residual_loss(
  latent: Float[Array, 'B h w C'],
  partial: Float[Array, 'R B h w C'],
  beta: float = 0.25,
  valid: Bool[Array, ' B'] | None = None,
) -> Float[Array, '']:
  """Codebook and commitment terms of a multi-scale tokenizer, mean over scales.

  Args:
    latent: raw latents.
    partial: the sum of codes after each scale (FoundationVision/VAR).
    beta: weight of the commitment.
    valid: samples that count.
  """

  return over_scales(codebook_loss, latent, partial, valid) + over_scales(
    commitment_loss, latent, partial, beta, valid
  )


def over_scales(
  loss: Callable[..., Float[Array, '']],
  latent: Float[Array, 'B h w C'],
  partial: Float[Array, 'R B h w C'],
  *more: Any,
) -> Float[Array, '']:
  """Mean of `loss(latent, codes, *more)` over the sums of `partial`."""
  return jnp.mean(jax.vmap(lambda codes: loss(latent, codes, *more))(partial))


def entropy_loss(
  distances: Float[Array, '... V'], temperature: float = 0.01
) -> Float[Array, '']:
  """Sharp assignments of each token, even use of all codes.

  Args:
    distances: squared distance of every latent to every code. Nothing is
      stopped: gradients reach latents and codebook.
    temperature: the affinities are `-distances / temperature`.

  Returns:
    Mean entropy per token minus the entropy of the mean assignment, in nats
    (FoundationVision/LlamaGen; the weight is the caller's).
  """
  distances = distances.astype(jnp.float32)
  flat = -distances.reshape(-1, distances.shape[-1]) / temperature
  log_p = jax.nn.log_softmax(flat, axis=-1)
  p = jnp.exp(log_p)
  sample = -jnp.mean(jnp.sum(p * log_p, axis=-1))
  mean_V = jnp.mean(p, axis=0)
  average = -jnp.sum(mean_V * jnp.log(mean_V + 1e-5))
  return sample - average


def hinge_d(
  real: Float[Array, '...'],
  fake: Float[Array, '...'],
  valid: Bool[Array, ' B'] | None = None,
) -> Float[Array, '']:
  """Discriminator hinge: `(mean relu(1 - real) + mean relu(1 + fake)) / 2`."""
  on_real = masked_mean(jax.nn.relu(1.0 - real.astype(jnp.float32)), valid)
  on_fake = masked_mean(jax.nn.relu(1.0 + fake.astype(jnp.float32)), valid)
  return 0.5 * (on_real + on_fake)


def hinge_g(
  fake: Float[Array, '...'], valid: Bool[Array, ' B'] | None = None
) -> Float[Array, '']:
  """Generator hinge: `-mean(fake)`."""
  return -masked_mean(fake, valid)


def psnr(
  images: Float[Array, 'B H W C'],
  truth: Float[Array, 'B H W C'],
  valid: Bool[Array, ' B'] | None = None,
) -> Float[Array, '']:
  """Peak signal-to-noise ratio of the batch in dB, images in [-1, 1]."""
  images = jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
  mse = masked_mean(jnp.square(images - truth), valid)
  return 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))
