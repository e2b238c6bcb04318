"""Tiny frozen networks and a config around them: task and editor tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scar_cases import noisy

from scar_jax import sharding
from scar_jax.artifacts import Artifact, save_artifact
from scar_jax.config import check, default_config
from scar_jax.models.encoders.semantic import EncoderConfig, SemanticEncoder
from scar_jax.models.tokenizers.make import make_tokenizer
from scar_jax.models.tokenizers.msvq_config import MSVQConfig
from scar_jax.models.tokenizers.vq import VQConfig
from scar_jax.sharding import unbox
from scar_jax.train.tasks import make_task

SIZE = 8  # pixels; 2 x 2 tokens


def _artifact(kind, cfg, module, seed):
  images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  shapes = jax.eval_shape(module(cfg).init, jax.random.key(0), images)
  params = noisy(unbox(shapes['params']), seed)
  return Artifact(kind, cfg, params, 'none', {}, '')


def frozen_artifacts(order='raster'):
  """A tokenizer of 16 codes and an encoder of 4 x 4 features."""
  small = dict(
    codes=16, code_dim=4, ch=8, ch_mult=(1,), res_blocks=1, groups=0,
    attn=False, patch=4,
  )  # fmt: skip
  vq = VQConfig(z_channels=8, **small)
  if order == 'scale':
    vq = MSVQConfig(patch_nums=(1, 2), phis=2, skip=True, **small)
  encoder = EncoderConfig(
    image_size=16, patch=4, width=8, depth=1, heads=2, table=4
  )
  return {
    'tokenizer': _artifact('tokenizer', vq, make_tokenizer, 1),
    'encoder': _artifact('encoder', encoder, SemanticEncoder, 2),
  }


def scar_config(**fields):
  """A checked config; `fields` are `section__name=value`."""
  raw = default_config('scar')
  small = dict(
    data__image_size=SIZE,
    model__width=8,
    model__layers=1,
    model__heads=2,
    text__length=4,
    text__width=8,
    text__layers=1,
    text__heads=2,
    sample__batch=3,
    sample__guidance=2.0,
  )
  for key, value in (small | fields).items():
    section, name = key.split('__')
    raw[section][name] = value
  return check(raw)


def scar_batch(count=2, seed=0):
  """Random pictures, prompts and validity."""
  rng = np.random.default_rng(seed)
  shape = (count, SIZE, SIZE, 3)
  return {
    'target': jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32),
    'condition': jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32),
    'text': jnp.asarray(rng.integers(3, 250, (count, 4)), jnp.int32),
    'text_mask': jnp.ones((count, 4), bool),
    'valid': jnp.ones(count, bool),
  }


def one_device(patch):
  """Meshes of one device: on eight emulated ones all takes many times as long.

  Args:
    patch: pytest's `monkeypatch`, or a `MonkeyPatch` of another scope.
  """
  make = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  patch.setattr(sharding, 'make_mesh', make)


def finished_runs(runs, order='raster', **fields):
  """Writes the work directories of three finished runs; returns `runs`."""
  artifacts = frozen_artifacts(order)
  fields = {'order__name': order, **fields}
  places = {
    f'{name}__artifact': str(runs / f'{name}_run') for name in artifacts
  }
  task = make_task(scar_config(**places, **fields), artifacts)
  shapes = jax.eval_shape(task.init, jax.random.key(0), scar_batch())
  params = noisy(unbox(shapes['params']))
  for name, part in artifacts.items():
    folder = runs / f'{name}_run' / 'artifact'
    save_artifact(folder, name, part.config, part.params)
  save_artifact(runs / 'scar_run' / 'artifact', *task.artifact(params, {}))
  return runs
