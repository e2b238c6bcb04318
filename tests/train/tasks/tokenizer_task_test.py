import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.train.tasks import tokenizer as tok

TINY = tok.TokenizerModel(
  codes=16, code_dim=4, ch=8, ch_mult=(1,), z_channels=8, patch=2, l2_norm='on'
)


def task_of(**loss):
  config = types.SimpleNamespace(
    model=TINY,
    loss=tok.TokenizerLoss(**loss),
    data=types.SimpleNamespace(image_size=8),
  )
  return tok.make_task(config, {})


def batch_of(n=4):
  images = jax.random.uniform(jax.random.key(1), (n, 8, 8, 3), minval=-1)
  return {'target': images}


def variables_of(task, batch):
  variables = nn.unbox(jax.jit(task.init)(jax.random.key(0), batch))
  return variables.pop('params'), variables


@pytest.fixture(scope='module')
def gan():
  task = task_of(gan=0.5, gan_start=1, gan_ch=4, gan_layers=1)
  batch = batch_of()
  return task, batch, *variables_of(task, batch)


@pytest.fixture(scope='module')
def grads_of(gan):
  return jax.jit(jax.value_and_grad(loss_of(gan[0]), has_aux=True))


def loss_of(task, train=True):
  return lambda params, extra, batch: task.loss(
    params, extra, {}, batch, jax.random.key(2), train
  )


def test_each_player_has_its_group_and_only_its_own_gradient(gan, grads_of):
  task, batch, params, extra = gan
  extra = {**extra, 'codes': {**extra['codes'], 'step': jnp.int32(1)}}
  labels = task.labels(params)
  assert set(jax.tree.leaves(labels['vq'])) == {'main'}
  assert set(jax.tree.leaves(labels['disc'])) == {'discriminator'}
  (_, (metrics, new)), grads = grads_of(params, extra, batch)
  assert metrics['gan_d'] > 0
  assert not np.array_equal(
    new['batch_stats']['norm_1']['mean'], extra['batch_stats']['norm_1']['mean']
  )
  # Without the adversarial weight the discriminator stands still, and the
  # decoder's gradient is another one.
  early = {**extra, 'codes': {**extra['codes'], 'step': jnp.int32(0)}}
  (_, (metrics, _)), before = grads_of(params, early, batch)
  assert metrics['gan_d'] == 0
  assert not any(np.any(g) for g in jax.tree.leaves(before['disc']))
  # The last bias shifts real and made pictures alike: while no hinge is met
  # its two gradients cancel.
  moved = dict(grads['disc'])
  last = max(name for name in moved if name.startswith('conv_'))
  moved[last] = {'kernel': moved[last]['kernel']}
  assert all(np.any(g) for g in jax.tree.leaves(moved))
  kernel = ('decoder', 'conv_out', 'kernel')
  a, b = grads['vq'], before['vq']
  for key in kernel:
    a, b = a[key], b[key]
  assert not np.allclose(a, b)


def test_discriminator_gradient_is_that_of_its_hinge_alone(gan, grads_of):
  task, batch, params, extra = gan
  extra = {**extra, 'codes': {**extra['codes'], 'step': jnp.int32(1)}}
  (_, (metrics, _)), grads = grads_of(params, extra, batch)
  made = jax.jit(task.model.apply)({'params': params['vq']}, batch['target'])
  fake = made.images

  def hinge(disc):
    def score(stats, images):
      return task._disc.apply(
        {'params': disc, 'batch_stats': stats},
        images,
        train=True,
        mutable=['batch_stats'],
      )

    real, new = score(extra['batch_stats'], batch['target'])
    fooled, _ = score(new['batch_stats'], fake)
    return 0.25 * jnp.mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + fooled))

  want, expected = jax.jit(jax.value_and_grad(hinge))(params['disc'])
  np.testing.assert_allclose(metrics['gan_d'], want, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    grads['disc'],
    expected,
  )


def test_evaluation_leaves_the_extra_state_alone(gan):
  task, batch, params, extra = gan
  _, (metrics, same) = jax.jit(loss_of(task, False))(params, extra, batch)
  jax.tree.map(np.testing.assert_array_equal, same, extra)
  assert {'mse', 'perceptual', 'codebook', 'commit', 'psnr'} <= set(metrics)
  assert 'l1' not in metrics


def test_padding_rows_carry_no_loss():
  task = task_of()
  batch = batch_of()
  params, extra = variables_of(task, batch)
  run = jax.jit(loss_of(task, False))
  alone, _ = run(params, extra, {'target': batch['target'][:2]})
  padded = {
    'target': batch['target'].at[2:].set(0.0),
    'valid': jnp.array([True, True, False, False]),
  }
  loss, _ = run(params, extra, padded)
  np.testing.assert_allclose(loss, alone, rtol=1e-5)


def test_codes_start_from_latents_and_dead_ones_move():
  task = task_of(vq_start=3, kmeans_iters=2, dead_after=2)
  batch = batch_of()
  params, extra = variables_of(task, batch)
  _, (_, extra) = jax.jit(loss_of(task))(params, extra, batch)
  rng = jax.random.key(5)
  update = jax.jit(task.post_update)
  same, after = update(params, extra, rng, jnp.int32(0))
  old = params['vq']['codebook']
  np.testing.assert_array_equal(same['vq']['codebook'], old)
  assert after['codes']['step'] == 1
  started, after = update(params, extra, rng, jnp.int32(2))
  codes = started['vq']['codebook']
  assert not np.array_equal(codes, old)
  np.testing.assert_allclose(np.linalg.norm(codes, axis=-1), 1, rtol=1e-5)
  after['codes']['idle'] = jnp.zeros(16, jnp.int32).at[3].set(2)
  moved, after = update(started, after, rng, jnp.int32(3))
  changed = np.any(moved['vq']['codebook'] != codes, axis=-1)
  np.testing.assert_array_equal(np.flatnonzero(changed), [3])
  assert after['codes']['idle'][3] == 0


def test_artifact_holds_the_autoencoder_only(gan):
  task, batch, params, extra = gan
  kind, cfg, exported = task.artifact(params, extra)
  assert kind == 'tokenizer'
  assert cfg == task.cfg
  assert set(exported) == {
    'encoder', 'decoder', 'quant_conv', 'post_quant_conv', 'codebook'
  }  # fmt: skip
  key = jax.random.key(0)
  pictures = jax.jit(task.pictures)(params, extra, {}, batch, key)
  assert pictures['reconstruction'].dtype == jnp.uint8
  assert pictures['reconstruction'].shape == (4, 8, 8, 3)


def test_sections_describe_the_model():
  assert tok.model_config(tok.TokenizerModel(size='vq16')).ch == 128
  section = dataclasses.replace(TINY, groups=4, attn='on', l2_norm='off')
  cfg = tok.model_config(section)
  assert (cfg.groups, cfg.attn, cfg.l2_norm, cfg.codes) == (4, True, False, 16)
  config = types.SimpleNamespace(
    model=TINY,
    loss=tok.TokenizerLoss(),
    data=types.SimpleNamespace(image_size=9),
  )
  with pytest.raises(ValueError, match=r'image_size=9 is not a multiple of 2'):
    tok.make_task(config, {})
