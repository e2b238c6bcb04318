import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax import objectives as obj
from scar_jax.sharding import make_mesh


def test_cross_entropy_counts_only_valid_tokens():
  probs = np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[1, 1, 1]] * 2])
  logits = jnp.log(jnp.asarray(probs, jnp.float32))
  targets = jnp.array([[0, 2], [1, 1]])
  first = (-np.log(0.5) - np.log(0.1)) / 2
  loss, metrics = obj.cross_entropy(logits, targets, jnp.array([True, False]))
  np.testing.assert_allclose(loss, first, rtol=1e-6)
  np.testing.assert_allclose(metrics['accuracy'], 0.5)
  np.testing.assert_allclose(metrics['perplexity'], np.exp(first), rtol=1e-6)
  loss, _ = obj.cross_entropy(logits, targets)
  np.testing.assert_allclose(loss, (first + np.log(3)) / 2, rtol=1e-6)
  per_token = jnp.array([[False, True], [False, False]])
  loss, _ = obj.cross_entropy(logits, targets, per_token)
  np.testing.assert_allclose(loss, -np.log(0.1), rtol=1e-6)


def test_cross_entropy_without_valid_samples_is_zero_and_finite():
  logits = jnp.full((2, 3, 4), jnp.inf).at[0].set(0.0)
  targets = jnp.zeros((2, 3), jnp.int32)
  loss, _ = obj.cross_entropy(logits, targets, jnp.zeros(2, bool))
  assert loss == 0.0


def test_of_equal_logits_the_first_is_the_guess():
  logits = jnp.zeros((1, 3, 4))
  found = obj.token_losses(logits, jnp.array([[0, 1, 3]]))
  assert found.hit.tolist() == [[1, 0, 0]]
  np.testing.assert_allclose(found.nll, np.log(4), rtol=1e-6)


def _head_case(bias, rows=4, positions=10, width=8, vocab=32):
  keys = jax.random.split(jax.random.key(0), 4)
  head = {'kernel': jax.random.normal(keys[0], (width, vocab))}
  if bias:
    head['bias'] = jax.random.normal(keys[1], (vocab,))
  hidden = jax.random.normal(keys[2], (rows, positions, width))
  targets = jax.random.randint(keys[3], (rows, positions), 0, vocab)
  return hidden, head, targets, jnp.arange(rows) > 0


def _whole(hidden, head, targets, valid):
  logits = hidden @ head['kernel'] + head.get('bias', 0.0)
  return obj.cross_entropy(logits, targets, valid)


def _chunked(chunk, hidden, head, targets, valid):
  found = obj.chunked_token_losses(hidden, head, targets, chunk)
  return obj.mean_losses(found, valid)


@pytest.mark.parametrize(
  ('chunk', 'bias', 'mesh'),
  [
    (5, False, None),
    (4, True, None),  # does not divide 10
    (16, False, None),
    (4, True, {'data': 2, 'fsdp': 2, 'tensor': 2}),
    (4, False, {'fsdp': 1, 'data': 2, 'tensor': 4}),
    (4, False, {'fsdp': 8}),  # 4 rows: left to the compiler
  ],
)
def test_chunks_and_shards_change_neither_loss_nor_gradient(chunk, bias, mesh):
  hidden, head, targets, valid = _head_case(bias)

  def run(loss):
    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(grad)(hidden, head, targets, valid)

  with jax.set_mesh(make_mesh({'data': 8} if mesh is None else mesh)):
    ours = run(functools.partial(_chunked, chunk))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
  jax.tree.map(close, ours, run(_whole))


def test_the_logits_of_all_positions_never_exist():
  case = _head_case(False, positions=12)
  mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(lambda *a: _chunked(3, *a)[0], argnums=(0, 1)))
    text = step.lower(*case).as_text()
  for whole in ('4x12x32x', '1x12x16x', '1x12x32x', '4x1x12x32x'):
    assert f'tensor<{whole}f32>' not in text
  assert 'tensor<1x3x16xf32>' in text  # one row, a chunk, half of V
  assert text.count('stablehlo.all_gather') == 1
  assert text.count('stablehlo.reduce_scatter') == 1


def test_shapes_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match=r'\(2, 3, 4\).*\(2, 2\)'):
    obj.cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros((2, 2), jnp.int32))
  with pytest.raises(ValueError, match=r'\(3,\).*\(2, 4\)'):
    obj.masked_mean(jnp.zeros((2, 4)), jnp.ones(3, bool))


def test_preservation_stops_at_the_features():
  restored = jnp.full((2, 1, 1, 2), 3.0)
  features = jnp.ones((2, 1, 1, 2))
  valid = jnp.array([True, False])
  assert obj.preservation(restored, features, valid) == 4.0
  grads = jax.grad(obj.preservation, argnums=(0, 1))(restored, features)
  assert np.all(grads[0] == 1.0)
  assert np.all(grads[1] == 0.0)


@pytest.mark.parametrize('stop', [False, True])
def test_alignment_gradient_reaches_the_target_unless_stopped(stop):
  hidden = jnp.array([[[1.0, 0.0]]])
  target = jnp.array([[[0.0, 1.0]]])

  def loss(h, t):
    return obj.alignment(h, t, stop_target_grad=stop)[0]

  assert loss(hidden, target) == 1.0
  g_h, g_t = jax.grad(loss, argnums=(0, 1))(hidden, target)
  np.testing.assert_array_equal(g_h, [[[1.0, -1.0]]])
  np.testing.assert_array_equal(g_t, 0.0 if stop else -g_h)
  _, metrics = obj.alignment(hidden, target)
  assert metrics['align_cosine'] == 0.0
  assert metrics['target_std'] == 0.0


def test_entropy_is_lowest_for_sharp_and_even_assignments():
  eye = 1.0 - jnp.eye(4)
  even = obj.entropy_loss(eye)
  np.testing.assert_allclose(even, -np.log(4), atol=2e-4)
  collapsed = obj.entropy_loss(jnp.tile(eye[:1], (4, 1)))
  np.testing.assert_allclose(collapsed, 0.0, atol=2e-4)
  undecided = obj.entropy_loss(jnp.zeros((4, 4)))
  np.testing.assert_allclose(undecided, 0.0, atol=2e-4)


def test_hinge_losses():
  real = jnp.array([[2.0], [0.0]])
  fake = jnp.array([[-3.0], [1.0]])
  assert obj.hinge_d(real, fake) == 0.5 * (0.5 + 1.0)
  assert obj.hinge_g(fake) == 1.0
  assert obj.hinge_g(fake, jnp.array([True, False])) == 3.0


def test_psnr_clips_and_scales():
  truth = jnp.ones((1, 2, 2, 3))
  np.testing.assert_allclose(obj.psnr(truth - 0.2, truth), 20.0, rtol=1e-5)
  np.testing.assert_allclose(obj.psnr(truth + 5.0, truth), 106.0206, rtol=1e-5)
