"""A tiny model of every part, shared by several tests."""

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.models.conditions import empty_conditions
from scar_jax.models.decoder import DecoderConfig
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.text_embedder import TextCondition
from scar_jax.sharding import unbox

OFF = PrefixConfig(compress='off', out=64)
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


def with_features(cond, seed):
  """Conditions whose features are drawn; ids and masks stay."""
  return jax.tree.map(
    lambda x: (
      jax.random.normal(jax.random.key(seed), x.shape)
      if x.dtype == jnp.float32
      else x
    ),
    cond,
  )


def tiny_model(cfg):
  """Model, variables and random conditions of three samples."""
  cond = empty_conditions(cfg, 3)
  tokens = jnp.zeros((3, cfg.grid[0] * cfg.grid[1]), jnp.int32)
  rngs = {'params': jax.random.key(0), 'order': jax.random.key(1)}
  shapes = jax.eval_shape(Scar(cfg).init, rngs, tokens, cond)['params']
  params = noisy(unbox(shapes), scale=0.4)
  return Scar(cfg), {'params': params}, with_features(cond, 2)
