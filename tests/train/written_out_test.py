"""Layers written out: an array for each, while files hold them stacked."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image
from scar_cases import noisy
from scar_setup import frozen_artifacts, one_device, scar_batch, scar_config

from scar_jax.artifacts import load_artifact, save_artifact
from scar_jax.models.stack import layers_apart, layers_stacked
from scar_jax.sharding import unbox
from scar_jax.train.checkpoints import CheckpointError
from scar_jax.train.loop import train
from scar_jax.train.tasks import make_task

LAYERS = 3
PLAIN = dict(
  model__layers=LAYERS,
  model__resid_dropout=0.0,
  model__ffn_dropout=0.0,
  model__token_dropout=0.0,
)


def _task(order='raster', **fields):
  config = scar_config(order__name=order, **PLAIN | fields)
  return make_task(config, frozen_artifacts(order))


def _abstract(task):
  init = functools.partial(task.init, batch=scar_batch())
  return jax.eval_shape(init, jax.random.key(0))['params']


def _value_and_grad(task, params):
  batch, key = scar_batch(), jax.random.key(0)
  call = jax.value_and_grad(
    lambda p: task.loss(p, {}, task.frozen, batch, key, True), has_aux=True
  )
  return jax.jit(call)(params)


@pytest.mark.parametrize(
  ('order', 'tables'), [('raster', 0), ('random', 2), ('scale', 0)]
)
def test_layers_share_the_cosines_of_their_places(order, tables):
  # Wide enough that the compiler does not compute all tables beforehand.
  wide = dict(model__width=64, model__heads=2, text__width=64)
  task = _task(order, model__scan=False, order__num_sets=2, **wide)
  params = task.as_trained(noisy(unbox(_abstract(task))))
  step = jax.jit(functools.partial(_value_and_grad, task)).lower(params)
  text = step.compile().as_text()
  # Of random places one for all layers, and one for the embedded queries.
  assert text.count(' cosine(') == tables
  assert text.count(' sine(') == tables


@pytest.mark.parametrize('order', ['raster', 'scale'])
def test_both_have_equal_losses_and_gradients(order):
  stacked = _task(order)
  apart = _task(order, model__scan=False, model__remat='full')
  params = noisy(unbox(_abstract(stacked)))
  assert stacked.as_trained(params) is params
  split = apart.as_trained(params)
  (want, _), wanted = _value_and_grad(stacked, params)
  (loss, _), grads = _value_and_grad(apart, split)
  assert 'layers' not in grads['decoder']
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(compare, layers_stacked(grads), wanted)
  for tree in (apart.artifact(split, {})[2], stacked.artifact(params, {})[2]):
    jax.tree.map(np.testing.assert_array_equal, tree, params)


def test_arrays_of_a_layer_lose_the_axis_of_layers():
  whole = _abstract(_task())['decoder']['layers']
  decoder = _abstract(_task(model__scan=False))['decoder']
  names = {f'layer_{i}' for i in range(LAYERS)}
  assert {name for name in decoder if name.startswith('layer')} == names
  boxes = dict(is_leaf=lambda x: isinstance(x, nn.Partitioned))
  for name in names:
    for one, every in zip(
      jax.tree.leaves(decoder[name], **boxes),
      jax.tree.leaves(whole, **boxes),
      strict=True,
    ):
      assert every.names == ('layers', *one.names)
      assert every.value.shape == (LAYERS, *one.value.shape)


def test_a_run_starts_from_resumes_and_exports_stacked_layers(
  tmp_path, monkeypatch
):
  parts = frozen_artifacts()
  for name, part in parts.items():
    save_artifact(tmp_path / name, name, part.config, part.params)
  line = {'source': 'a.png', 'target': 'a.png', 'instruction': 'keep it'}
  Image.linear_gradient('L').save(tmp_path / 'a.png')
  (tmp_path / 'train.jsonl').write_text(json.dumps(line))
  one_device(monkeypatch)

  def run(workdir, steps, start='start', **fields):
    config = scar_config(
      **PLAIN | dict(model__scan=False, optim__schedule='constant') | fields,
      data__source='jsonl',
      data__path=str(tmp_path / 'train.jsonl'),
      data__batch=2,
      tokenizer__artifact=str(tmp_path / 'tokenizer'),
      encoder__artifact=str(tmp_path / 'encoder'),
      train__steps=steps,
      train__save_every=2,
      train__ema=0.0,
      train__picture_every=0,
      optim__warmup_steps=0,
    )
    config = dataclasses.replace(config, init_from=str(tmp_path / start))
    train(config, tmp_path / workdir)
    return load_artifact(tmp_path / workdir / 'artifact').params

  start = noisy(unbox(_abstract(_task())))
  cfg = make_task(scar_config(**PLAIN), parts).editor
  save_artifact(tmp_path / 'start', 'scar', cfg, start)
  kept = run('kept', 1, optim__lr=0.0)
  jax.tree.map(np.testing.assert_array_equal, kept, start)

  whole = run('whole', 4)
  moved = whole['decoder']['layers']['ffn']['w2']['kernel']
  before = start['decoder']['layers']['ffn']['w2']['kernel']
  assert (np.abs(moved - before).max((1, 2)) > 1e-6).all()  # in every layer
  run('halves', 2)
  halves = run('halves', 4)
  jax.tree.map(np.testing.assert_array_equal, halves, whole)
  with pytest.raises(CheckpointError, match=r'model\.scan'):
    run('halves', 5, model__scan=True)
  with pytest.raises(ValueError, match='missing decoder/layer_0/attn'):
    run('other', 1, start='tokenizer')


def test_taking_apart_keeps_what_is_not_a_layer():
  params = noisy(unbox(_abstract(_task())))
  apart = layers_apart(params)
  assert apart['text'] is params['text']
  assert layers_stacked(params)['decoder'] is params['decoder']
