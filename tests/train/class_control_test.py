"""A class and a control map together, from records to pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy
from scar_setup import (
  SIZE,
  frozen_artifacts,
  one_device,
  scar_batch,
  scar_config,
)

from scar_jax.artifacts import save_artifact
from scar_jax.data.controls import Controlled
from scar_jax.data.pipeline import make_loader
from scar_jax.data.records import Record
from scar_jax.editor import Editor
from scar_jax.sharding import unbox
from scar_jax.train.loop import train
from scar_jax.train.tasks import make_task

CLASSES = 3
FIELDS = dict(
  text__kind='label', text__classes=CLASSES, model__cond_dropout='joint'
)


def _picture(seed, size=SIZE):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (size, size, 3), np.uint8)


class Photos:
  """Pictures of a class, without a condition."""

  def __len__(self):
    return 8

  def describe(self):
    return 'photos'

  def load(self, i, rng=None):
    return Record(_picture(i, 12), label=i % CLASSES, key=f'{i}.jpg')


@pytest.fixture(scope='module', params=['raster', 'scale'])
def made(request):
  """Task with random weights, its artifacts, a batch."""
  artifacts = frozen_artifacts(request.param)
  task = make_task(scar_config(order__name=request.param, **FIELDS), artifacts)
  batch = scar_batch(3)
  batch['label'] = jnp.array([0, 1, 2])
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  params = noisy(unbox(shapes['params']), scale=0.5)
  # Conditions that differ enough to change an arg-max.
  home, name = ('scale', 'label') if _scales(task) else ('text', 'table')
  params[home][name] = 10 * params[home][name]
  params['prefix']['proj']['kernel'] = 20 * params['prefix']['proj']['kernel']
  return task, params, artifacts, batch


def _scales(task):
  return task.editor.model.order == 'scale'


def _loss(task, train):
  """The loss of parameters and a batch; compiled for all calls together."""

  def loss(params, batch):
    key = jax.random.key(5)
    return task.loss(params, {}, task.frozen, batch, key, train)[0]

  return loss


def test_both_conditions_are_learned_from(made):
  task, params, _, batch = made
  grads = jax.jit(jax.grad(_loss(task, False)))(params, batch)
  table = grads['scale']['label'] if _scales(task) else grads['text']['table']
  norms = np.linalg.norm(table, axis=1)
  assert (norms[:CLASSES] > 1e-6).all()
  assert norms[CLASSES] == 0  # nothing is dropped outside training
  assert np.linalg.norm(grads['prefix']['proj']['kernel']) > 1e-6


@pytest.mark.parametrize('rate', [0.0, 1.0])
def test_a_dropped_label_is_the_null_class(made, rate):
  task, params, _, batch = made
  model = dataclasses.replace(
    task.editor.model, text_dropout=rate, prefix_dropout=rate
  )
  task = type(task)(
    dataclasses.replace(task.editor, model=model),
    made[2],
    task.weights,
  )
  other = batch | {'label': jnp.array([1, 2, 0])}
  blank = batch | {'condition': -batch['condition']}
  loss = jax.jit(_loss(task, True))
  first, second, third = (loss(params, b) for b in (batch, other, blank))
  assert (first == second) == (rate == 1.0)
  # Preservation still looks at the map; here it has no weight of its own.
  assert np.isfinite([first, second, third]).all()


def test_guidance_on_class_and_map(made):
  task, params, artifacts, _ = made
  editor = Editor(
    task.editor, params, {k: a.config for k, a in artifacts.items()},
    task.frozen,
  )  # fmt: skip
  maps = [_picture(i) for i in range(3)]

  def run(labels, maps=maps, **settings):
    settings = dict(temperature=0.0, seed=1) | settings
    made = editor(maps, labels=labels, **settings)
    return np.stack([np.asarray(m) for m in made])

  plain = run([0, 1, 2], guidance=1.0)
  assert (plain != run([2, 0, 1], guidance=1.0)).any()
  assert (plain != run([0, 1, 2], maps[::-1], guidance=1.0)).any()
  assert (plain != run([0, 1, 2], guidance=9.0)).any()
  both = run([0, 1, 2], guidance=9.0, guidance_image=9.0)
  assert (both != run([0, 1, 2], guidance=9.0)).any()
  # One class for all.
  np.testing.assert_array_equal(run(1), run([1, 1, 1]))
  for wrong in (CLASSES, -1, 1.0, True):
    with pytest.raises(ValueError, match=r'label 1 is .* from 0 to 2, the'):
      run([0, wrong, 2])
  with pytest.raises(ValueError, match='2 labels for 3 requests'):
    run([0, 1])


# One order: the trainer is the same, and the time goes into compiling it.
@pytest.mark.parametrize('made', ['scale'], indirect=True)
def test_training_from_records_makes_an_editor(made, tmp_path):
  _, _, artifacts, _ = made
  order = made[0].editor.model.order
  for name, part in artifacts.items():
    save_artifact(tmp_path / name, name, part.config, part.params)
  config = scar_config(
    order__name=order,
    tokenizer__artifact=str(tmp_path / 'tokenizer'),
    encoder__artifact=str(tmp_path / 'encoder'),
    data__batch=8,
    train__steps=2,
    train__save_every=2,
    **FIELDS,
  )
  loader = make_loader(
    Controlled(Photos(), ('canny',)), None, 8, SIZE, classes=CLASSES
  )
  with pytest.MonkeyPatch.context() as patch:
    one_device(patch)
    summary = train(config, tmp_path / 'run', loader=loader)
  assert summary['steps'] == 2
  [picture] = Editor.load(tmp_path / 'run')(_picture(0, 12), labels=2)
  assert picture.size == (12, 12)
