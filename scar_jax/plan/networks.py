"""Frozen networks as shapes: what a plan has in place of artifacts.

In: a checked config, whose sections name an artifact or a size. Out: artifacts
whose parameters are `ShapeDtypeStruct`s, made from the config of the network
alone; no weights are read. The task takes them as if they had been loaded.
"""

import dataclasses
import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from scar_jax.artifacts import Artifact, read_description
from scar_jax.config import Config
from scar_jax.config_values import read_section, read_value
from scar_jax.models.encoders.semantic import SemanticEncoder, encoder_config
from scar_jax.models.encoders.t5 import T5Encoder, t5_config
from scar_jax.models.tokenizers.make import make_tokenizer, tokenizer_config
from scar_jax.sharding import unbox
from scar_jax.types import PyTree

_BY_SIZE = {
  'tokenizer': tokenizer_config,
  'encoder': encoder_config,
  'text': t5_config,
}


def abstract_artifacts(config: Config) -> dict[str, Artifact]:
  """The frozen networks that a config names, by name.

  Raises:
    ValueError: an artifact that is not there, an unknown size or field.
  """
  found = {}
  for name in _BY_SIZE:
    section: Any = getattr(config, name, None)
    artifact = getattr(section, 'artifact', '')
    if artifact:
      network = _described(name, artifact)
    elif getattr(section, 'size', ''):
      network = network_config(name, section.size)
    else:
      continue
    found[name] = Artifact(
      kind=name,
      config=network,
      params=network_shapes(name, network, config),
      fingerprint='',
      meta={},
      path=artifact,
    )
  return found


def _described(name: str, path: str) -> Any:
  """The config of an artifact on disk."""
  description = read_description(path)
  module, cls = description['class'].split(':')
  schema = getattr(importlib.import_module(module), cls)
  return read_section(name, schema, description['config'])


def network_config(name: str, text: str) -> Any:
  """The config of a network by size and changed fields.

  Args:
    name: 'tokenizer', 'encoder' or 'text'.
    text: a size, then fields: `B,image_size=448,features=last4`.

  Raises:
    ValueError: an unknown size or field.
  """
  size, *changes = re.split(r',(?=\s*\w+=)', text)
  fields = dict(part.strip().split('=', maxsplit=1) for part in changes)
  kind: dict[str, Any] = {}
  if name == 'tokenizer' and 'patch_nums' in fields:
    # Scales make it a tokenizer of another class.
    path = 'tokenizer.size.patch_nums'
    kind['patch_nums'] = read_value(path, tuple[int, ...], fields['patch_nums'])
  base = _BY_SIZE[name](size.strip(), **kind)
  values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
  return read_section(f'{name}.size', type(base), values | fields)


def network_shapes(name: str, network: Any, config: Config) -> PyTree:
  """Shapes of the parameters of a network."""
  if name == 'text':
    module: Any = T5Encoder(network)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)  # of any length
  else:
    size, encodes = config.data.image_size, name == 'tokenizer'
    module = make_tokenizer(network) if encodes else SemanticEncoder(network)
    example = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return unbox(
    jax.eval_shape(module.init, jax.random.key(0), example)['params']
  )
