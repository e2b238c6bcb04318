import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy
from scar_setup import frozen_artifacts, scar_batch, scar_config

from scar_jax.sharding import unbox
from scar_jax.train.tasks import make_task


@pytest.fixture(scope='module')
def artifacts():
  return frozen_artifacts()


def _params(task, batch):
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  return noisy(unbox(shapes['params']))


@pytest.fixture(scope='module')
def run(artifacts):
  task = make_task(scar_config(), artifacts)
  batch = scar_batch()
  loss = jax.jit(
    lambda p, b, rng, train: task.loss(p, {}, task.frozen, b, rng, train),
    static_argnums=3,
  )
  return task, _params(task, batch), batch, loss


def test_loss_is_the_weighted_sum_of_its_metrics(run):
  _, params, batch, loss = run
  key = jax.random.key(0)
  total, (metrics, extra) = loss(params, batch, key, False)
  assert extra == {}
  assert set(metrics) == {
    'ce', 'accuracy', 'perplexity', 'pres', 'align', 'target_std',
    'align_cosine',
  }  # fmt: skip
  expected = metrics['ce'] + 1.0 * metrics['pres'] + 0.5 * metrics['align']
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics['perplexity'], np.exp(metrics['ce']), 1e-5)
  # Without dropout nothing depends on the key.
  again, _ = loss(params, batch, jax.random.key(7), False)
  np.testing.assert_array_equal(again, total)


def test_dropout_only_in_training(run):
  _, params, batch, loss = run
  first, _ = loss(params, batch, jax.random.key(0), True)
  second, _ = loss(params, batch, jax.random.key(1), True)
  assert first != second


def test_invalid_rows_carry_no_loss(run):
  _, params, batch, loss = run
  key = jax.random.key(0)
  batch = batch | {'valid': jnp.array([True, False])}
  total, (metrics, _) = loss(params, batch, key, False)
  other = {
    k: v if k == 'valid' else v.at[1].set(v[0]) for k, v in batch.items()
  }
  same, (same_metrics, _) = loss(params, other, key, False)
  np.testing.assert_allclose(same, total, rtol=1e-6)
  for name, value in metrics.items():
    if name != 'target_std':  # the mean it is taken from sees all rows
      np.testing.assert_allclose(same_metrics[name], value, rtol=1e-5)


def test_a_chunked_loss_is_the_same_loss():
  """In the scale order, which logs the last scale apart."""
  artifacts, batch = frozen_artifacts('scale'), scar_batch()
  batch['valid'] = jnp.array([True, False])

  def run(chunk):
    config = scar_config(order__name='scale', loss__chunk=chunk)
    task = make_task(config, artifacts)
    params = _params(task, batch)
    grad = jax.value_and_grad(
      lambda p: task.loss(p, {}, task.frozen, batch, jax.random.key(0), True),
      has_aux=True,
    )
    return jax.jit(grad)(params)

  compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(compare, run(3), run(0))


def test_frozen_networks_take_another_type(artifacts):
  plain = make_task(scar_config(), artifacts)
  task = make_task(scar_config(encoder__dtype='bfloat16'), artifacts)
  kept, narrow = task.frozen['tokenizer'], task.frozen['encoder']
  assert {str(x.dtype) for x in jax.tree.leaves(kept)} == {'float32'}
  assert {str(x.dtype) for x in jax.tree.leaves(narrow)} == {'bfloat16'}
  assert task.parts.encoder.cfg.dtype == 'bfloat16'
  batch = scar_batch()
  ours, full = (
    jax.jit(t.parts.conditions)(t.frozen, batch)[0].features
    for t in (task, plain)
  )
  assert ours.dtype == jnp.float32
  assert 0 < np.abs(ours - full).max() < 0.1 * np.abs(full).max()
  # The exported model remembers it.
  exported = task.artifact(_params(task, batch), {})
  assert exported[1].encoder_dtype == 'bfloat16'


def test_fixed_null_conditions_are_not_optimised(artifacts):
  task = make_task(
    scar_config(text__null='fixed', model__cond_dropout='joint'), artifacts
  )
  params = _params(task, scar_batch())
  labels = task.labels(params)
  assert labels['text']['null_text'] == 'frozen'
  assert labels['null_prefix'] == 'main'
  assert labels['text']['fc1']['kernel'] == 'main'


def test_ablations_need_less(artifacts):
  no_source = make_task(
    scar_config(prefix__compress='off'),
    {'tokenizer': artifacts['tokenizer']},
  )
  batch = scar_batch()
  params = _params(no_source, batch)
  assert 'prefix' not in params
  fewer = {k: v for k, v in batch.items() if k != 'condition'}
  _, (metrics, _) = jax.eval_shape(
    lambda p: no_source.loss(
      p, {}, no_source.frozen, fewer, jax.random.key(0), True
    ),
    params,
  )
  assert set(metrics) == {'ce', 'accuracy', 'perplexity'}
  no_text = make_task(
    scar_config(text__kind='none', sample__guidance=1.0), artifacts
  )
  assert 'text' not in _params(no_text, batch)
  pixels = make_task(
    scar_config(prefix__compress='vq'), {'tokenizer': artifacts['tokenizer']}
  )
  assert set(_params(pixels, batch)) == {'decoder', 'text'}


def test_pictures_can_be_compiled(run):
  task, params, batch, _ = run
  made = jax.jit(task.pictures)(
    params, {}, task.frozen, batch, jax.random.key(0)
  )
  assert list(made) == ['condition', 'sampled', 'target', 'tokenizer']
  for image in made.values():
    assert image.shape == (2, 8, 8, 3)
    assert image.dtype == jnp.uint8
  np.testing.assert_array_equal(
    made['target'], np.round((batch['target'] + 1) * 127.5).astype(np.uint8)
  )


def test_impossible_tasks_are_errors(artifacts):
  with pytest.raises(ValueError, match=r'encoder\.artifact is empty'):
    make_task(scar_config(), {'tokenizer': artifacts['tokenizer']})
  with pytest.raises(
    ValueError, match=r'image_size=10 is not a multiple of 4,'
  ):
    make_task(scar_config(data__image_size=10), artifacts)
  with pytest.raises(ValueError, match="guidance_mode='text' needs null"):
    make_task(scar_config(text__kind='none'), artifacts)
  task = make_task(scar_config(), artifacts)
  batch = scar_batch()
  del batch['condition']
  with pytest.raises(ValueError, match="the batch has no field 'condition'"):
    task.loss({}, {}, task.frozen, batch, jax.random.key(0), True)


def test_tables_start_from_the_codebook(artifacts):
  """Similar codes get similar embeddings and logits; boxes are kept."""
  task = make_task(scar_config(model__codebook_init=True), artifacts)
  plain = make_task(scar_config(), artifacts)
  batch = scar_batch()

  @jax.jit  # both at once: what they share is compiled once
  def init(key):
    return [t.init(key, batch)['params'] for t in (task, plain)]

  boxed, other = init(jax.random.key(0))
  assert jax.tree.structure(boxed) == jax.tree.structure(other)
  codes = np.asarray(task.parts.codes(task.frozen))
  params, other = unbox(boxed), unbox(other)
  spread = codes - codes.mean(0)
  spread = spread @ spread.T
  for name, leaf in (('token', 'embedding'), ('head', 'kernel')):
    table = np.asarray(params['decoder'][name][leaf])
    table = table if name == 'token' else table.T
    # Random projections of 4 channels into 8 keep the geometry roughly.
    assert np.corrcoef(spread.ravel(), (table @ table.T).ravel())[0, 1] > 0.7
    assert np.linalg.matrix_rank(table) == codes.shape[1]
  np.testing.assert_array_equal(
    params['prefix']['proj']['kernel'], other['prefix']['proj']['kernel']
  )
