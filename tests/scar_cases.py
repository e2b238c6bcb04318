"""Configs and conditions of the golden models, shared by several tests."""

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert import editar, scar_official
from scar_jax.models.condition import TextCondition
from scar_jax.models.decoder import DecoderConfig
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar import Conditions, Scar, empty_conditions
from scar_jax.models.scar_config import ScarConfig
from scar_jax.sharding import unbox

OFF = PrefixConfig(compress='off', out=64)
CLOSE = dict(rtol=1e-4, atol=2e-4)


def nhwc(x):
  return jnp.asarray(np.transpose(x, (0, 2, 3, 1)))


def golden_config(name, **changes):
  """The ScarConfig of a golden model."""
  t5 = {'kind': 't5', 'length': 5, 'width': 24}
  vq = PrefixConfig('vq', grid=(4, 4), width=64, out=64, null='fixed')
  prefix, text, grid, dropout = {
    'gpt_c2i': (OFF, {'kind': 'label', 'classes': 10}, 4, 'text'),
    'gpt_t2i': (OFF, {**t5, 'length': 6, 'width': 48}, 4, 'text'),
    'gpt_edit': (vq, t5, 4, 'joint'),
    'scar_prefill': (_features(32), t5, 4, 'text'),
    'scar_prefill_1th': (_features(8), t5, 3, 'text'),
  }[name]
  text['mask_pad'] = changes.pop('mask_pad', False)
  fields = dict(
    decoder=DecoderConfig(
      width=64, layers=2, heads=4, multiple_of=32, vocab=64
    ),
    prefix=prefix,
    text=TextCondition(**text),
    grid=(grid, grid),
    prefix_mask='causal',
    cond_dropout=dropout,
  )
  return ScarConfig(**(fields | changes))


def _features(width):
  return PrefixConfig(k=2, grid=(8, 8), width=width, out=64)


def golden_params(name, cfg, tensors):
  """Parameters of a golden model, or gradients under the same names."""
  module = scar_official if name.startswith('scar') else editar
  return module.convert(cfg, tensors)


def golden_conditions(name, arrays):
  """Conditions of the teacher-forced run."""
  if name == 'gpt_c2i':
    return Conditions(label=jnp.asarray(arrays['labels']))
  if name == 'gpt_t2i':
    return Conditions(
      text=jnp.asarray(arrays['caption']),
      text_mask=jnp.asarray(arrays['emb_masks'] > 0),
    )
  text = jnp.asarray(arrays['text'])
  more = {'text': text, 'text_mask': jnp.ones(text.shape[:2], bool)}
  if name == 'gpt_edit':
    source = jnp.asarray(arrays['source_ids']).reshape(-1, 4, 4)
    return Conditions(source_tokens=source, **more)
  return Conditions(features=nhwc(arrays['feat_source']), **more)


def to_torch(entries, tree, tensors):
  """Our tree under the checkpoint's names and layout: undoes the table."""
  out = {}
  for entry in entries:
    node = tree
    for key in entry.path.split('/'):
      node = node[key]
    (source,) = entry.sources
    layers = enumerate(node) if '{i}' in source else [(None, node)]
    for i, value in layers:
      name = source if i is None else source.replace('{i}', str(i))
      value, shape = np.asarray(value), tensors[name].shape
      if entry.rule == 'conv':
        value = value.transpose(3, 2, 0, 1)
      elif entry.rule == 'linear':
        value = value.reshape(shape[::-1]).T
      out[name] = value.reshape(shape)
  return out


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


def tiny_model(cfg):
  """Model, variables and random conditions of three samples."""
  cond = empty_conditions(cfg, 3)
  tokens = jnp.zeros((3, cfg.grid[0] * cfg.grid[1]), jnp.int32)
  rngs = {'params': jax.random.key(0), 'order': jax.random.key(1)}
  shapes = jax.eval_shape(Scar(cfg).init, rngs, tokens, cond)['params']
  cond = jax.tree.map(
    lambda x: (
      jax.random.normal(jax.random.key(2), x.shape)
      if x.dtype == jnp.float32
      else x
    ),
    cond,
  )
  return Scar(cfg), {'params': noisy(unbox(shapes), scale=0.4)}, cond
