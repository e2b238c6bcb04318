"""VAR of ours: training and sampling."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax import compiler
from scar_jax.artifacts import Artifact
from scar_jax.bench.ours.common import Ours, gap, on_device, to_train, training
from scar_jax.bench.theirs.common import Given, Setting
from scar_jax.bench.theirs.var import GUIDANCE
from scar_jax.config import LossConfig
from scar_jax.convert import var, var_vqvae
from scar_jax.convert.parity_vq import nhwc
from scar_jax.models.conditions import Conditions
from scar_jax.models.scar import Scar
from scar_jax.parts import EditorConfig, Parts
from scar_jax.precision import for_sampling, with_dtype
from scar_jax.sampling import generate
from scar_jax.sampling_steps import split_scales
from scar_jax.train.tasks.scar import ScarTask


def _load(given: Given, setting: Setting) -> tuple[EditorConfig, Any, Artifact]:
  """The config that fits, its weights, and the tokenizer."""
  weights, sides = given.weights['var'], setting.sides
  editor = var.detect(weights, patch_nums=sides)
  editor = with_dtype(editor, setting.dtype)
  params = on_device(var.convert(editor, weights))
  weights = given.weights['vae']
  cfg = var_vqvae.detect(weights, sides)
  frozen = on_device(var_vqvae.convert(cfg, weights))
  return editor, params, Artifact('tokenizer', cfg, frozen, 'none', {}, '')


def train(given: Given, setting: Setting) -> Ours:
  """A training step of the transformer, class-conditional."""
  editor, params, tokenizer = _load(given, setting)
  model = to_train(editor.model, setting)
  editor = dataclasses.replace(editor, model=model)
  task = ScarTask(editor, {'tokenizer': tokenizer}, LossConfig())
  return training(task, params, given.inputs, setting)


def sample(given: Given, setting: Setting, weights: str = '') -> Ours:
  """Images of classes, with guidance."""
  editor, params, tokenizer = _load(given, setting)
  params = for_sampling(editor.model, params, weights)
  scales, cfg = split_scales(
    dataclasses.replace(
      editor.sample, top_k=1, top_p=0.0, guidance=1 + GUIDANCE
    )
  )
  scar = Scar(editor.model)
  parts = Parts(editor, {'tokenizer': tokenizer.config})
  make: Any = Conditions

  @functools.partial(jax.jit, compiler_options=compiler.options())
  def program(params, frozen, label, seeds, scales) -> Any:
    made = generate(
      scar,
      {'params': params},
      make(label=label),
      seeds,
      scales,
      cfg,
      accumulate=parts.accumulate(frozen),
    )
    images = parts.images(frozen, made.tokens, made.latent)
    return (jnp.clip(images, -1, 1) + 1) / 2

  run = functools.partial(
    program,
    params,
    {'tokenizer': tokenizer.params},
    jnp.asarray(given.inputs['label']),
    jnp.arange(setting.batch, dtype=jnp.uint32),
    scales,
  )

  def differ(theirs: Mapping[str, np.ndarray]) -> tuple[float, str]:
    return gap(run(), nhwc(theirs['images'])), 'images'

  return Ours(run, differ)
