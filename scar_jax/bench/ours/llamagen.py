"""LlamaGen of ours: training and cached sampling of the GPT, and VQ-16."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax import compiler
from scar_jax.artifacts import Artifact
from scar_jax.bench.ours.common import (
  Ours,
  gap,
  on_device,
  same,
  to_train,
  training,
)
from scar_jax.bench.theirs.common import Given, Setting
from scar_jax.bench.theirs.llamagen import GUIDANCE, PIXELS
from scar_jax.config import LossConfig
from scar_jax.convert import editar, gpt_sizes, llamagen_vq
from scar_jax.convert.parity_vq import nhwc
from scar_jax.filters import SamplerConfig
from scar_jax.models.conditions import Conditions
from scar_jax.models.convolutions import each_picture
from scar_jax.models.scar import Scar
from scar_jax.models.tokenizers.vq import VQConfig, VQModel
from scar_jax.parts import EditorConfig
from scar_jax.precision import for_sampling, with_dtype
from scar_jax.sampling import Sampler
from scar_jax.train.tasks.scar import ScarTask

_SAMPLER = SamplerConfig(top_k=1, guidance=GUIDANCE)


def _gpt(given: Given, setting: Setting) -> tuple[EditorConfig, Any]:
  """The config that fits the reference, and its weights as ours."""
  weights = given.weights['gpt']
  found = gpt_sizes.detect_editor(
    weights, 'llamagen', image_size=PIXELS * setting.grid
  )
  params = on_device(editar.convert(found, weights))
  return with_dtype(found, setting.dtype), params


def train(given: Given, setting: Setting) -> Ours:
  """A training step, class-conditional."""
  found, params = _gpt(given, setting)
  # The tokens are given: no tokenizer runs on either side.
  tokenizer = Artifact('tokenizer', VQConfig(), {}, 'none', {}, '')
  editor = EditorConfig(to_train(found.model, setting))
  task = ScarTask(editor, {'tokenizer': tokenizer}, LossConfig())
  return training(task, params, given.inputs, setting)


def sample(given: Given, setting: Setting, weights: str = '') -> Ours:
  """All tokens of an image through the cache, with guidance."""
  found, params = _gpt(given, setting)
  params = for_sampling(found.model, params, weights)
  make: Any = Conditions
  run: Any = functools.partial(
    Sampler(Scar(found.model), _SAMPLER).run,
    {'params': params},
    make(label=jnp.asarray(given.inputs['label'])),
    jnp.arange(setting.batch),
  )

  def differ(theirs: Mapping[str, np.ndarray]) -> tuple[float, str]:
    # Along their tokens, so that one near tie does not change all that follow.
    tokens = theirs['tokens']
    raw = np.asarray(run(forced=jnp.asarray(tokens), trace=True).raw)
    told = same(run().tokens, tokens, 'tokens')
    return gap(raw, theirs['logits'].reshape(raw.shape)), f'logits; {told}'

  return Ours(run, differ)


def _vq(given: Given, method: str, setting: Setting) -> Any:
  """A method of the network, as the editor runs it."""
  weights = given.weights['vq']
  cfg = llamagen_vq.detect(weights)
  variables = {'params': on_device(llamagen_vq.convert(cfg, weights))}
  model = VQModel(cfg)
  pixels = (PIXELS * setting.grid) ** 2

  # On CPUs large pictures one by one.
  def run(variables: Any, x: Any) -> Any:
    network = functools.partial(model.apply, variables, method=method)
    return each_picture(network, x, pixels)

  program = jax.jit(run, compiler_options=compiler.options())
  return functools.partial(program, variables)


def encode(given: Given, setting: Setting) -> Ours:
  """Images to codes."""
  apply = _vq(given, 'encode', setting)
  run = functools.partial(apply, jnp.asarray(nhwc(given.inputs['images'])))

  def differ(theirs: Mapping[str, np.ndarray]) -> tuple[float, str]:
    found, latent = run()
    raw = nhwc(theirs['raw'])
    want = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    told = same(np.ravel(found), theirs['ids'], 'codes')
    return gap(latent, want), f'latents; {told}'

  return Ours(run, differ)


def decode(given: Given, setting: Setting) -> Ours:
  """Codes to images."""
  apply = _vq(given, 'decode_tokens', setting)
  grid = (setting.batch, setting.grid, setting.grid)
  tokens = jnp.asarray(given.inputs['tokens'].reshape(grid))
  run = functools.partial(apply, tokens)

  def differ(theirs: Mapping[str, np.ndarray]) -> tuple[float, str]:
    return gap(run(), nhwc(theirs['images'])), 'images'

  return Ours(run, differ)
