"""A tiny model trained on pictures of three shapes, as a whole run."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from scar_setup import frozen_artifacts, scar_config

from scar_jax import editor_inputs, sharding
from scar_jax.artifacts import load_artifact, save_artifact
from scar_jax.editor import Editor
from scar_jax.train import inputs
from scar_jax.train.loop import train
from scar_jax.train.tasks import make_task

SHAPES = ((8, 8), (4, 16), (16, 4))  # height, width


@pytest.fixture(scope='module')
def work(tmp_path_factory):
  """Frozen networks, and pairs of pictures in three shapes, one broken."""
  root = tmp_path_factory.mktemp('aspects')
  for name, part in frozen_artifacts().items():
    save_artifact(root / name, name, part.config, part.params)
  rng, lines = np.random.default_rng(0), []
  for i in range(14):
    height, width = SHAPES[(0, 0, 0, 1, 1, 2)[i % 6]]
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
  (root / '3_target.png').write_bytes(b'broken')
  (root / 'train.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  return root


def _config(root, steps, **fields):
  config = scar_config(
    data__source='jsonl',
    data__path=str(root / 'train.jsonl'),
    data__aspects=('1:1', '4:1', '1:4'),
    data__aspect_step=4,
    data__batch=8,
    data__max_bad_share=1.0,
    tokenizer__artifact=str(root / 'tokenizer'),
    encoder__artifact=str(root / 'encoder'),
    text__kind='none',
    sample__guidance=1.0,
    sample__batch=2,
    train__steps=steps,
    train__log_every=1,
    train__save_every=2,
    **fields,
  )
  return dataclasses.replace(config, seed=1)


def _losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [(json.loads(x)['step'], json.loads(x)['loss']) for x in lines]


def _pictures(*sizes):
  rng = np.random.default_rng(1)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def test_a_run_compiles_once_for_each_shape_resumes_and_edits(
  work, tmp_path, monkeypatch
):
  place, seen = inputs.place_batch, []

  def noted(local, mesh):
    seen.append((local['target'].shape[1:3], local['condition'].shape[1:3]))
    return place(local, mesh)

  monkeypatch.setattr(inputs, 'place_batch', noted)
  # Programs for one device compile in half the time.
  make = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(sharding, 'make_mesh', make)
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  summary = train(_config(work, 5, train__picture_every=2), whole)
  assert {target for target, _ in seen} == set(SHAPES)
  assert all(target == condition for target, condition in seen)
  assert summary['compilations'] == 3
  assert summary['compiled_again'] == []
  losses = _losses(whole)
  assert np.isfinite([loss for _, loss in losses]).all()
  drawn = {Image.open(path).size for path in (whole / 'pictures').iterdir()}
  assert len(drawn) == 2
  assert drawn < {(8 * w, 4 * (h + 2)) for h, w in SHAPES}

  shutil.copytree(whole, parts)
  for gone in ('checkpoints/4', 'checkpoints/5', 'artifact'):
    shutil.rmtree(parts / gone)
  train(_config(work, 5), parts)
  assert _losses(parts) == losses + losses[2:]
  a, b = (load_artifact(folder).params for folder in (whole, parts))
  jax.tree.map(np.testing.assert_array_equal, a, b)

  editor = Editor.load(whole, buckets=(2,))
  assert editor.cfg.shapes == SHAPES
  pictures = _pictures((5, 21), (9, 8), (4, 16))
  made = editor(pictures, seed=[1, 2, 3], output='array')
  assert [m.shape for m in made] == [p.shape for p in pictures]
  assert editor.programs.traced == 6  # three steps, two shapes
  [alone] = editor(pictures[2], seed=3, output='array')
  np.testing.assert_array_equal(alone, made[2])
  assert editor.programs.traced == 6


def test_requests_of_one_shape_are_made_together(work):
  config = _config(work, 1)
  task = make_task(config, frozen_artifacts())
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


def test_shapes_that_do_not_fit_the_networks_are_named():
  config = scar_config(data__aspects=('1:1', '5:2'), data__aspect_step=1)
  with pytest.raises(ValueError, match=r'multiples of 4 \(set .*aspect_step'):
    make_task(config, frozen_artifacts())
