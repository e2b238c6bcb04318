"""Training on pictures of several shapes, and editing in them."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image
from scar_setup import frozen_artifacts, one_device, scar_batch, scar_config
from toy import ToyConfig, ToyTask

from scar_jax import editor_inputs
from scar_jax.artifacts import save_artifact
from scar_jax.data import buckets
from scar_jax.editor import Editor
from scar_jax.sharding import annotated, unbox
from scar_jax.train import inputs
from scar_jax.train.loop import train
from scar_jax.train.tasks import make_task

SHAPES = ((8, 8), (4, 16), (16, 4))  # height, width


class Repaint(nn.Module):
  """A 1 x 1 convolution, for pictures of any shape."""

  cfg: ToyConfig

  @nn.compact
  def __call__(self, x, train):
    init = annotated(nn.initializers.lecun_normal(), None, None, None, None)
    return nn.Conv(3, (1, 1), kernel_init=init, name='conv')(x)


class RepaintTask(ToyTask):
  def __init__(self):
    super().__init__()
    self.model = Repaint(ToyConfig())


def _data(root, shapes, broken=()):
  """Pairs of pictures, twice as large as the shapes."""
  rng, lines = np.random.default_rng(0), []
  for i, (height, width) in enumerate(shapes):
    for role in ('source', 'target'):
      pixels = rng.integers(0, 256, (2 * height, 2 * width, 3), np.uint8)
      Image.fromarray(pixels).save(root / f'{i}_{role}.png')
    lines.append(
      {
        'source': f'{i}_source.png',
        'target': f'{i}_target.png',
        'instruction': f'number {i}',
      }
    )
  for i in broken:
    (root / f'{i}_target.png').write_bytes(b'broken')
  (root / 'train.jsonl').write_text('\n'.join(map(json.dumps, lines)))


def _config(root, steps, seed=1, **fields):
  config = scar_config(
    data__source='jsonl',
    data__path=str(root / 'train.jsonl'),
    data__aspects=('1:1', '4:1', '1:4'),
    data__aspect_step=4,
    data__batch=8,
    data__max_bad_share=1.0,
    text__kind='none',
    sample__guidance=1.0,
    sample__batch=2,
    train__steps=steps,
    train__log_every=1,
    train__save_every=2,
    **fields,
  )
  return dataclasses.replace(config, seed=seed)


def _losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [(json.loads(x)['step'], json.loads(x)['loss']) for x in lines]


def _noted(monkeypatch):
  """Shapes of target and condition of every batch that is trained on."""
  place, seen = inputs.place_batch, []

  def noted(local, mesh):
    seen.append((local['target'].shape[1:3], local['condition'].shape[1:3]))
    return place(local, mesh)

  monkeypatch.setattr(inputs, 'place_batch', noted)
  return seen


def test_a_run_compiles_once_for_each_shape_and_resumes_exactly(
  tmp_path, monkeypatch
):
  _data(tmp_path, [SHAPES[(0, 0, 0, 1, 1, 2)[i % 6]] for i in range(14)], (3,))
  seen = _noted(monkeypatch)
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  config = _config(tmp_path, 6, train__picture_every=1)
  summary = train(config, whole, RepaintTask())
  assert {target for target, _ in seen} == set(SHAPES)
  assert all(target == condition for target, condition in seen)
  assert summary['compilations'] == 3
  assert summary['compiled_again'] == []
  losses = _losses(whole)
  assert np.isfinite([loss for _, loss in losses]).all()
  drawn = {Image.open(path).size for path in (whole / 'pictures').iterdir()}
  assert drawn == {(8 * w, h + 2) for h, w in SHAPES}

  shutil.copytree(whole, parts)
  for gone in ('checkpoints/6', 'artifact'):
    shutil.rmtree(parts / gone)
  # The buckets are those that the run began with: nobody looks again.
  monkeypatch.setattr(buckets, 'survey_sizes', None)
  train(_config(tmp_path, 6), parts, RepaintTask())
  assert _losses(parts) == losses + losses[4:]


@pytest.mark.slow
def test_a_model_of_several_shapes_edits_in_them(tmp_path, monkeypatch):
  for name, part in frozen_artifacts().items():
    save_artifact(tmp_path / name, name, part.config, part.params)
  _data(tmp_path, SHAPES[1:] * 5)
  seen = _noted(monkeypatch)
  one_device(monkeypatch)
  named = {
    f'{name}__artifact': str(tmp_path / name)
    for name in ('tokenizer', 'encoder')
  }
  config = _config(tmp_path, 3, **named, prefix__compress='resize')
  summary = train(config, tmp_path / 'run')
  assert {target for target, _ in seen} == set(SHAPES[1:])
  assert summary['compilations'] == 2  # no picture is square
  assert np.isfinite([loss for _, loss in _losses(tmp_path / 'run')]).all()

  editor = Editor.load(tmp_path / 'run', buckets=(2,))
  assert editor.cfg.shapes == SHAPES
  pictures = _pictures((5, 21), (4, 16))
  made = editor(pictures, seed=[1, 2], output='array')
  assert [m.shape for m in made] == [p.shape for p in pictures]
  [alone] = editor(pictures[1], seed=2, output='array')
  np.testing.assert_array_equal(alone, made[1])
  assert editor.programs.traced == 3


def _pictures(*sizes):
  rng = np.random.default_rng(1)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def test_requests_of_one_shape_are_made_together(tmp_path):
  task = make_task(_config(tmp_path, 1), frozen_artifacts())
  pictures = _pictures((5, 21), (9, 8), (4, 16), (30, 7))
  requests = editor_inputs.read(task.editor, pictures, None, None, None)
  assert requests.shapes == [(4, 16), (8, 8), (4, 16), (16, 4)]
  groups = editor_inputs.batches(requests, 2)
  assert groups == [([0, 2], 0), ([1], 0), ([3], 0)]
  batch, _ = editor_inputs.arrays(requests, [0, 2], 2, None)
  assert batch['condition'].shape == (2, 4, 16, 3)
  # The picture fills its canvas, whose shape it has.
  exact = (batch['condition'][1] + 1) * 127.5
  np.testing.assert_allclose(exact, pictures[2], atol=0.01)
  masked = editor_inputs.read(
    task.editor, pictures[0], None, None, np.full((5, 21), 255, np.uint8)
  )
  assert masked.cuts[0].keep.shape == (4,)
  drawn = editor_inputs.read(
    task.editor, pictures[0], None, None, None, control='canny'
  )
  assert drawn.pictures[0].shape == (4, 16, 3)


@pytest.mark.parametrize(
  ('order', 'compress'),
  [('raster', 'full'), ('random', 'full'), ('raster', 'vq'), ('random', 'off')],
)
def test_all_losses_are_defined_for_every_shape(order, compress):
  fields = {'order__name': order, 'order__num_sets': 2}
  config = scar_config(
    data__aspects=('1:1', '4:1', '1:4'),
    data__aspect_step=4,
    prefix__compress=compress,
    **fields,
  )
  task, batch = make_task(config, frozen_artifacts()), scar_batch()
  params = jax.eval_shape(task.init, jax.random.key(0), batch)['params']
  for shape in SHAPES:
    pictures = {
      name: jax.ShapeDtypeStruct((2, *shape, 3), 'float32')
      for name in ('target', 'condition')
    }
    _, (metrics, _) = jax.eval_shape(
      lambda p, b: task.loss(p, {}, task.frozen, b, jax.random.key(0), True),
      unbox(params),
      {**batch, **pictures},
    )
    parts, model = task.networks(pictures)
    assert model.cfg.grid == (shape[0] // 4, shape[1] // 4)
    assert parts.cfg.model == model.cfg
    assert ('pres' in metrics) == (compress == 'full')


def test_shapes_that_do_not_fit_the_networks_are_named():
  config = scar_config(data__aspects=('1:1', '5:2'), data__aspect_step=1)
  with pytest.raises(ValueError, match=r'multiples of 4 \(set .*aspect_step'):
    make_task(config, frozen_artifacts())
