"""Noise on the tokens that a training pass sees.

In: the tokens of a batch. Out: the same with some exchanged for other ones.
Called by `models/scar.py`. The model then cannot lean on the tokens before
alone: every token asks the prefix and the text again, and its own mistakes in
sampling are nothing new (the idea of the self-correction in
FoundationVision/Infinity).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def exchanged(
  tokens: Int[Array, 'B N'], key: Array, most: float, lost: float
) -> Int[Array, 'B N']:
  """Replaces a share of the tokens, another in each sample, by other ones.

  The codes are those of the next sample, at the same places: a mistake looks
  like a picture too, and random codes would be told apart at once. A batch of
  one has no other sample and takes codes of its own from elsewhere.

  Args:
    tokens: inputs of training.
    key: of the draws.
    most: largest share that is replaced.
    lost: share of samples of which no token is left: a few clean ones already
      tell what the text says.
  """
  share, whole, hit = jax.random.split(key, 3)
  rows = (len(tokens), 1)
  share = most * jax.random.uniform(share, rows)
  share = jnp.where(jax.random.uniform(whole, rows) < lost, 1.0, share)
  hit = jax.random.uniform(hit, tokens.shape) < share
  if len(tokens) == 1:
    other = jnp.roll(tokens, tokens.shape[1] // 2, axis=1)
  else:
    other = jnp.roll(tokens, 1, axis=0)
  return jnp.where(hit, other, tokens)
