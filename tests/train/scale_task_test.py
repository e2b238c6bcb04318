"""The whole path of the scale order: task, trainer, artifact, editor."""

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
from scar_jax.data.text import make_text
from scar_jax.data.transforms import to_float
from scar_jax.editor import Editor
from scar_jax.eval.run import Reconstructor
from scar_jax.models.codebook_init import start_from_codebook
from scar_jax.parts import Parts, TextSetup
from scar_jax.sharding import unbox
from scar_jax.train.loop import train
from scar_jax.train.tasks import make_task

ROWS = 8


@pytest.fixture(scope='module')
def artifacts():
  return frozen_artifacts('scale')


def _config(**fields):
  return scar_config(order__name='scale', **fields)


def _params(task):
  shapes = jax.eval_shape(task.init, jax.random.key(0), scar_batch())
  return noisy(unbox(shapes['params']))


class Same:
  """A loader of one batch."""

  def __init__(self, batch):
    self.batch = batch

  def __next__(self):
    return self.batch

  def get_state(self):
    return {}

  def set_state(self, state):
    del state


@pytest.fixture(scope='module')
def run(artifacts, tmp_path_factory):
  """A trained model, its editor, what it was shown, what its run told."""
  root = tmp_path_factory.mktemp('scale')
  for name, part in artifacts.items():
    save_artifact(root / name, name, part.config, part.params)
  rng = np.random.default_rng(0)
  pictures = rng.integers(0, 256, (2, ROWS, SIZE, SIZE, 3), np.uint8)
  pictures[0, 4:] = pictures[0, :4]  # the text alone tells these apart
  prompts = ['a'] * 4 + ['b'] * 4
  text = make_text(TextSetup(length=4))
  pairs = [text.encode(p, 'prompt') for p in prompts]
  batch = {
    'condition': to_float(pictures[0]),
    'target': to_float(pictures[1]),
    'text': np.stack([ids for ids, _ in pairs]),
    'text_mask': np.stack([mask for _, mask in pairs]),
    'valid': np.ones(ROWS, bool),
    'index': np.arange(ROWS, dtype=np.int32),
  }
  config = _config(
    tokenizer__artifact=str(root / 'tokenizer'),
    encoder__artifact=str(root / 'encoder'),
    data__batch=ROWS,
    model__width=32,
    model__layers=2,
    model__resid_dropout=0.0,
    model__ffn_dropout=0.0,
    model__token_dropout=0.0,
    prefix__norm='layernorm',
    optim__lr=1e-2,
    optim__weight_decay=0.0,
    train__steps=150,
    train__log_every=75,
    train__save_every=150,
    train__picture_every=150,
  )
  with pytest.MonkeyPatch.context() as patch:
    one_device(patch)
    summary = train(config, root / 'run', loader=Same(batch))
  work = root / 'run'
  # One size of batch: a program for each setting and no more.
  return work, Editor.load(work, buckets=(ROWS,)), pictures, prompts, summary


def test_training_overfits_a_handful_of_samples(run):
  work, editor, pictures, prompts, summary = run
  assert summary['compilations'] == 1
  assert (work / 'pictures').is_dir()
  assert editor.cfg.sample.ramp == 'sets'
  made = editor(
    list(pictures[0]), prompts, temperature=0.0, guidance=1.0, seed=0
  )
  part = frozen_artifacts('scale')['tokenizer']
  want = Reconstructor(part.config, part.params, ROWS)(pictures[1])
  gap = np.stack([np.asarray(m) for m in made]).astype(int) - want
  # Pictures whose 5 tokens are all right differ by rounding alone.
  right = np.abs(gap).max((1, 2, 3)) <= 1
  assert right.sum() >= 7


def test_guidance_and_the_null_text_change_the_result(run):
  _, editor, pictures, prompts, _ = run

  def run(prompts, guidance):
    made = editor(
      list(pictures[0]), prompts, guidance=guidance, temperature=0.0
    )
    return np.stack([np.asarray(m) for m in made])

  null = run('', 5.0)
  assert np.any(run(prompts, 1.0) != null)
  # Nothing is left to push away from.
  np.testing.assert_array_equal(run('', 1.0), null)


def test_mixed_codes_give_another_picture(run):
  _, editor, pictures, prompts, _ = run
  given = pictures[0, 0], prompts[0]
  hot = dict(
    seed=1, guidance=1.0, temperature=5.0
  )  # it has learned to be sure of a code
  first = editor(*given, **hot)[0]
  mixed = editor(*given, **hot, smooth=True)[0]
  assert np.any(np.asarray(first) != np.asarray(mixed))
  with pytest.raises(ValueError, match=r'smooth=True; accepted: True with a t'):
    editor(pictures[0, 0], prompts[0], temperature=0.0, smooth=True)


def test_the_loss_is_logged_for_the_last_scale_too(artifacts):
  task = make_task(_config(), artifacts)
  params, batch = _params(task), scar_batch()
  loss = jax.jit(
    lambda p, b: task.loss(p, {}, task.frozen, b, jax.random.key(0), False)
  )
  total, (metrics, _) = loss(params, batch)
  assert {'ce_last', 'accuracy_last', 'pres', 'align'} <= set(metrics)
  assert metrics['ce_last'] != metrics['ce']
  expected = metrics['ce'] + 1.0 * metrics['pres'] + 0.5 * metrics['align']
  np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.parametrize('kind', ['byte', 'label', 'none'])
def test_every_kind_of_text_has_a_loss_and_gradients(artifacts, kind):
  guidance = 1.0 if kind == 'none' else 2.0
  config = _config(text__kind=kind, text__classes=5, sample__guidance=guidance)
  task = make_task(config, artifacts)
  params = _params(task)
  batch = scar_batch() | {'label': jnp.array([1, 4])}
  grads = jax.jit(
    jax.grad(
      lambda p: task.loss(p, {}, task.frozen, batch, jax.random.key(0), True)[0]
    )
  )(params)
  scale = params['scale']
  assert scale['label'].shape[0] == (6 if kind == 'label' else 1)
  assert ('pooled' in scale) == (kind == 'byte')
  assert ('text' in params) == (kind == 'byte')
  still = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(grads)
    if not np.any(g) and 'null_text' not in jax.tree_util.keystr(path)
  ]
  assert not still


def test_noise_changes_inputs_and_what_mends_them(artifacts):
  task = make_task(_config(model__token_noise=1.0), artifacts)
  batch = {'target': scar_batch(16)['target']}
  plain = task.parts.tokens(task.frozen, batch['target'])
  target, seen = task._tokens(task.frozen, batch, jax.random.key(1), True)
  share = np.mean(np.asarray(target != seen), axis=1)
  assert 0.2 < share.mean() < 0.8
  assert share.std() > 0.1
  # The first scale has nothing before it to mend.
  np.testing.assert_array_equal(target[:, 0], plain[:, 0])
  wrong = np.asarray(seen[:, 0] != plain[:, 0])
  mended = np.any(np.asarray(target != plain)[:, 1:], axis=1)
  assert not mended[~wrong].any()
  assert mended[wrong].mean() > 0.5
  target, seen = task._tokens(task.frozen, batch, jax.random.key(1), False)
  assert seen is None
  np.testing.assert_array_equal(target, plain)


def test_the_head_starts_from_the_codebook(artifacts):
  task = make_task(_config(model__codebook_init=True), artifacts)
  fresh = _params(task)
  params = start_from_codebook(
    fresh, task.parts.codes(task.frozen), jax.random.key(0)
  )
  assert jax.tree.structure(params) == jax.tree.structure(fresh)
  codes = np.asarray(task.parts.codes(task.frozen))
  spread = codes - codes.mean(0)
  table = np.asarray(params['decoder']['head']['kernel']).T
  similar = np.corrcoef((spread @ spread.T).ravel(), (table @ table.T).ravel())
  assert similar[0, 1] > 0.7


def test_impossible_tasks_are_errors(artifacts):
  single = frozen_artifacts()
  with pytest.raises(ValueError, match="'scale' with a single-scale token"):
    make_task(_config(), single)
  with pytest.raises(ValueError, match="'raster' with a multi-scale tokeni"):
    make_task(scar_config(), artifacts)
  with pytest.raises(ValueError, match="compress='vq' with order='scale'"):
    make_task(_config(prefix__compress='vq'), artifacts)
  with pytest.raises(ValueError, match="smooth=True with order 'raster'"):
    make_task(scar_config(sample__smooth=True), single)
  with pytest.raises(ValueError, match=r"block='adaln'; accepted: 'scale'"):
    make_task(
      scar_config(model__size='d16', model__width=0, model__heads=0), single
    )
  encoder = artifacts['encoder']
  bigger = dataclasses.replace(
    artifacts['tokenizer'],
    config=dataclasses.replace(
      artifacts['tokenizer'].config, patch_nums=(1, 3)
    ),
  )
  with pytest.raises(ValueError, match=r'patch_nums=\(1, 3\) for a token grid'):
    make_task(_config(), {'tokenizer': bigger, 'encoder': encoder})
  model = make_task(_config(), artifacts).editor
  with pytest.raises(ValueError, match=r'sides \(1, 3\); accepted: .*\(1, 2\)'):
    Parts(model, {'tokenizer': bigger.config, 'encoder': encoder.config})
