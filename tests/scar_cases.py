"""A tiny model of every part, shared by several tests."""

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.models.condition import TextCondition
from scar_jax.models.decoder import DecoderConfig
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar_config import ScarConfig

CLOSE = dict(rtol=1e-4, atol=2e-4)


def tiny_config(**changes):
  """A small model with its own random weights, every part present."""
  fields = dict(
    decoder=DecoderConfig(width=16, layers=2, heads=2, multiple_of=8, vocab=11),
    prefix=PrefixConfig(k=2, grid=(4, 4), width=6, out=16),
    text=TextCondition(kind='t5', length=3, width=5),
    grid=(2, 3),
    text_rope='identity',
  )
  return ScarConfig(**(fields | changes))


def noisy(shapes, seed=0, scale=0.3):
  """Every parameter drawn, so that zero-initialised heads show."""
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(seed)
  new = [
    jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32)
    for x in leaves
  ]
  return jax.tree.unflatten(tree, new)
