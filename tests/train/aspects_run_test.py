"""A tiny model trained on pictures of three shapes, as a whole run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from scar_setup import frozen_artifacts, scar_config

from scar_jax.artifacts import load_artifact, save_artifact
from scar_jax.train import inputs
from scar_jax.train.loop import train

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
    train__steps=steps,
    train__log_every=1,
    train__save_every=100,
    **fields,
  )
  return dataclasses.replace(config, seed=1)


def _losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [(json.loads(x)['step'], json.loads(x)['loss']) for x in lines]


def test_a_run_compiles_once_for_each_shape_and_resumes_exactly(
  work, tmp_path, monkeypatch
):
  place, seen = inputs.place_batch, []

  def noted(local, mesh):
    seen.append((local['target'].shape[1:3], local['condition'].shape[1:3]))
    return place(local, mesh)

  monkeypatch.setattr(inputs, 'place_batch', noted)
  more = dict(train__picture_every=1)
  summary = train(_config(work, 5, **more), tmp_path / 'whole')
  assert {s for s, _ in seen} == set(SHAPES)
  assert all(target == condition for target, condition in seen)
  assert summary['compilations'] == 3
  assert summary['compiled_again'] == []
  losses = _losses(tmp_path / 'whole')
  assert np.isfinite([loss for _, loss in losses]).all()
  train(_config(work, 2), tmp_path / 'parts')
  # The sizes are those that the run began with, whatever the files become.
  stored = (tmp_path / 'parts' / 'sizes.npz').read_bytes()
  train(_config(work, 5), tmp_path / 'parts')
  assert (tmp_path / 'parts' / 'sizes.npz').read_bytes() == stored
  assert _losses(tmp_path / 'parts') == losses
  a, b = (load_artifact(tmp_path / name).params for name in ('whole', 'parts'))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  pictures = (tmp_path / 'whole' / 'pictures').iterdir()
  sides = {Image.open(path).size for path in pictures}
  assert sides == {(8 * w, 4 * (h + 2)) for h, w in SHAPES}
