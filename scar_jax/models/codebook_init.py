"""Token table and head that start from the geometry of the codebook.

In: fresh decoder parameters and the tokenizer's codes. Out: the same tree with
these two replaced (the scale order has no token table: it sees the codes). From
scratch a decoder must learn which codes look alike from counts of tokens alone;
here similar codes start with similar embeddings and similar logits. Ours;
LlamaGen starts from noise and a zero head (3.3).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scar_jax.types import PyTree

_EMBED_STD = 0.06
_LOGIT_STD = 1.5  # of fresh logits, for hidden states of unit RMS


def codebook_tables(
  codes: Float[Array, 'V C'], width: int, rng: Array
) -> tuple[Float[Array, 'V D'], Float[Array, 'D V']]:
  """Token table and head kernel: random linear images of the codes.

  Args:
    codes: in the space in which their distances mean similarity.
    width: D, of the decoder.
    rng: of the two projections.
  """
  z = codes - jnp.mean(codes, axis=0)
  z = z / jnp.sqrt(jnp.mean(jnp.square(z)) + 1e-12)
  shape = (codes.shape[1], width)
  table, head = (
    z @ jax.random.normal(key, shape) / jnp.sqrt(codes.shape[1])
    for key in jax.random.split(rng)
  )
  return _EMBED_STD * table, _LOGIT_STD * width**-0.5 * head.T


def start_from_codebook(
  params: PyTree, codes: Float[Array, 'V C'], rng: Array
) -> PyTree:
  """`params` of a `Scar` with token table and head of its decoder replaced.

  Args:
    params: fresh, boxed with their logical axes or not.
    codes: V rows, as many as the decoder's vocabulary.
    rng: see `codebook_tables`.
  """
  decoder = params['decoder']
  width = jax.tree.leaves(decoder['head']['kernel'])[0].shape[0]
  table, head = codebook_tables(codes, width, rng)
  # Mapping over a boxed leaf keeps its box.
  kernel = jax.tree.map(lambda _: head, decoder['head']['kernel'])
  new = {**decoder, 'head': {**decoder['head'], 'kernel': kernel}}
  if 'token' in decoder:
    token = jax.tree.map(lambda _: table, decoder['token']['embedding'])
    new['token'] = {'embedding': token}
  return {**params, 'decoder': new}
