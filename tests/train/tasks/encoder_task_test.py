import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scar_jax import sharding
from scar_jax.models.encoders.semantic import SemanticEncoder
from scar_jax.train.tasks import encoder

MODEL = encoder.EncoderModel(width=16, depth=1, heads=2)
HEADS = (('group', 3), ('tone', 2))


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  target = rng.uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
  return {
    'target': target,
    'condition': 0.2 * target,
    'valid': np.array([1, 1, 1, 1, 1, 0], bool),
    'label_group': np.array([0, 1, 2, 0, -1, 1], np.int32),
    'label_tone': np.array([0, 1, 0, 1, 1, 1], np.int32),
  }


def _task(model=MODEL, **loss):
  config = types.SimpleNamespace(
    model=model,
    loss=encoder.EncoderLoss(**({'labels': HEADS} | loss)),
    data=types.SimpleNamespace(image_size=8),
  )
  return encoder.make_task(config, {})


@pytest.fixture(scope='module')
def params(batch):
  """Fresh ones; no weight of the loss changes them."""
  init = jax.jit(_task().init)
  return sharding.unbox(init(jax.random.key(0), batch)['params'])


def _loss(task):
  """Of training, for parameters and a batch."""

  @jax.jit
  def run(params, batch):
    return task.loss(params, {}, {}, batch, jax.random.key(1), True)

  return run


def test_patches_are_row_major_and_invertible():
  image = jnp.arange(2 * 8 * 8 * 3.0).reshape(2, 8, 8, 3)
  x = encoder.patches(image, 4)
  np.testing.assert_array_equal(x[0, 1], image[0, :4, 4:].reshape(-1))
  np.testing.assert_array_equal(encoder.from_patches(x, 8, 4), image)


def test_unknown_labels_and_invalid_rows_do_not_count():
  logits = jnp.array([[4.0, 0, 0], [0, 0, 4.0], [0, 9.0, 0], [9.0, 0, 0]])
  label = jnp.array([0, 1, -1, 2])
  valid = jnp.array([True, True, True, False])
  loss, accuracy = encoder.head_loss(logits, label, valid)
  want = np.mean([np.log(1 + 2 * np.exp(-4)), np.log(2 + np.exp(4))])
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert accuracy == 0.5
  none = encoder.head_loss(logits, jnp.full((4,), 3), valid)
  assert (none[0], none[1]) == (0, 0)


def test_loss_is_the_weighted_sum_and_ignores_padding(batch, params):
  task = _task(visible=2.0, masked=0.5, label=0.1)
  run = _loss(task)
  loss, (m, _) = run(params, batch)
  want = 2 * m['visible'] + 0.5 * m['masked']
  want += 0.1 * (m['ce_group'] + m['ce_tone']) / 2
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  other = {**batch, 'target': batch['target'].copy()}
  other['target'][5] = 0.3
  again, _ = run(params, other)
  np.testing.assert_allclose(again, loss, rtol=1e-6)


def test_conditions_add_rows_without_labels(batch, params):
  plain = _loss(_task(mask_max=0.0))(params, batch)[1][0]
  both = _task(mask_max=0.0, conditions=True)
  more = _loss(both)(params, batch)[1][0]
  np.testing.assert_allclose(more['ce_group'], plain['ce_group'], rtol=1e-6)
  assert abs(more['visible'] - plain['visible']) > 1e-3
  assert more['masked'] == 0


def test_hidden_patches_reach_the_loss_only_as_truth(batch, params):
  # All hidden patches' pixels change: predictions must not.
  task = _task()
  images = jnp.asarray(batch['target'])
  hidden = jnp.zeros((6, 4), bool).at[:, 2].set(True)
  run = jax.jit(task.model.apply)
  before = run({'params': params}, images, hidden)
  changed = images.at[:, 4:, :4].set(0.7)
  after = run({'params': params}, changed, hidden)
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_training_improves_pixels_and_labels(batch, params):
  task = _task(mask_max=0.3)
  tx = optax.adam(1e-2)
  key = jax.random.key(2)

  @jax.jit
  def step(params, opt):
    grad, (metrics, _) = jax.grad(task.loss, has_aux=True)(
      params, {}, {}, batch, key, True
    )
    updates, opt = tx.update(grad, opt)
    return optax.apply_updates(params, updates), opt, metrics

  opt, seen = tx.init(params), []
  for _ in range(60):
    params, opt, metrics = step(params, opt)
    seen.append(metrics)
  assert seen[-1]['psnr'] > seen[0]['psnr'] + 3
  assert seen[-1]['acc_group'] == 1
  assert seen[-1]['acc_tone'] == 1


def test_artifact_is_the_encoder_alone(batch, params):
  task = _task()
  kind, cfg, exported = task.artifact(params, {})
  assert kind == 'encoder'
  assert set(exported) == {'network'}
  images = jnp.asarray(batch['target'])
  encode = jax.jit(SemanticEncoder(cfg).apply)
  features = encode({'params': exported}, images)
  assert features.shape == (6, 2, 2, 16)
  want = jax.jit(task.model.apply)({'params': params}, images)[0]
  np.testing.assert_allclose(features.reshape(6, 4, 16), want, rtol=1e-6)


def test_pictures(batch, params):
  task = _task()
  key = jax.random.key(0)
  shown = jax.jit(task.pictures)(params, {}, {}, batch, key)
  assert set(shown) == {'target', 'half_hidden', 'seen'}
  assert {v.shape for v in shown.values()} == {(6, 8, 8, 3)}
  want = np.rint((batch['target'] + 1) * 127.5).astype(np.uint8)
  np.testing.assert_array_equal(shown['target'], want)


def test_config():
  cfg = _task(encoder.EncoderModel(size='B', patch=4, layerscale='off')).cfg
  assert (cfg.width, cfg.depth, cfg.table, cfg.layerscale) == (
    768,
    12,
    2,
    False,
  )
  assert cfg.normalize == 'imagenet'
  assert _task().cfg.normalize == 'pm1'


def test_errors_name_what_is_accepted(batch, params):
  task = _task(labels=(('mood', 3),))
  with pytest.raises(ValueError, match='label_mood; the batch has condition'):
    task.loss(params, {}, {}, batch, jax.random.key(0), True)
  with pytest.raises(ValueError, match=r'mask_max=1\.0 hides everything'):
    _task(mask_max=1.0)
  with pytest.raises(ValueError, match='8x8 pixels'):
    _task(encoder.EncoderModel(patch=3))
  with pytest.raises(ValueError, match=r"'sam-B' cannot .*accepted: tiny, S"):
    _task(encoder.EncoderModel(size='sam-B'))
