import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models.tokenizers import layers

SAME = ((1, 1), (1, 1))


@pytest.mark.parametrize(
  ('c', 'f', 'window', 'stride', 'padding'),
  [
    (3, 5, 3, 1, SAME),
    (6, 4, 3, 1, SAME),
    (4, 4, 3, 2, ((0, 1), (0, 1))),
    (5, 3, 4, 1, SAME),
    (3, 6, 4, 2, SAME),
    (6, 3, 3, 1, ((0, 2), (2, 1))),
  ],
)
def test_both_gradients_of_a_convolution_agree(c, f, window, stride, padding):
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (2, 8, 12, c))
  kernel = jax.random.normal(keys[1], (window, window, c, f))

  def loss(x, kernel, impl):
    y = layers.conv2d(x, kernel, stride, padding, impl)
    return jnp.sum(jnp.sin(y))

  grad = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  native, ours = grad(x, kernel, 'xla'), grad(x, kernel, 'matmul')
  for a, b in zip(native, ours, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  assert np.abs(native[1]).max() > 1


def test_downsampling_pads_below_and_to_the_right_only():
  module = layers.Downsample()
  x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
  kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
  params = {'conv': {'kernel': kernel, 'bias': jnp.zeros(1)}}
  y = module.apply({'params': params}, x)
  np.testing.assert_array_equal(y[0, ..., 0], [[0, 0], [0, 0]])
  y = module.apply({'params': params}, jnp.roll(x, (1, 1), (1, 2)))
  assert y[0, 0, 0, 0] == 4.0
  y = module.apply({'params': params}, jnp.roll(x, (3, 3), (1, 2)))
  np.testing.assert_array_equal(y[0, ..., 0], [[0, 0], [0, 4]])


def test_upsampling_repeats_pixels():
  x = jnp.arange(4.0).reshape(1, 2, 2, 1)
  kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
  params = {'conv': {'kernel': kernel, 'bias': jnp.zeros(1)}}
  y = layers.Upsample().apply({'params': params}, x)[0, ..., 0]
  np.testing.assert_array_equal(
    y, np.arange(4).reshape(2, 2).repeat(2, 0).repeat(2, 1)
  )


@pytest.mark.parametrize('impl', ['xla', 'matmul'])
def test_a_doubled_convolution_is_that_of_the_doubled_map(impl, monkeypatch):
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (2, 4, 6, 5))
  kernel = jax.random.normal(keys[1], (3, 3, 5, 4))

  def run(platform):
    monkeypatch.setattr(layers, 'platform', lambda: platform)

    def loss(x, kernel):
      y = layers.doubled_conv2d(x, kernel, impl)
      return jnp.sum(jnp.sin(y)), y

    grads, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
    return y, *grads

  for got, want in zip(run('cpu'), run('tpu'), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want).max() > 1


def test_depth_to_space_is_the_inverse():
  x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
  y = layers.space_to_depth(x, 2)
  np.testing.assert_array_equal(y[0, 0, 0], x[0, :2, :2].reshape(-1))
  np.testing.assert_array_equal(layers.depth_to_space(y, 2), x)


@pytest.mark.parametrize('groups', [0, 2])
def test_norms_have_zero_mean_and_unit_variance(groups):
  x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
  module = layers.Norm(groups)
  y = module.apply(module.init(jax.random.key(0), x), x)
  axes = (-1,)
  if groups:
    y, axes = y.reshape(2, 16, 2, 4), (1, 3)
  np.testing.assert_allclose(jnp.mean(y, axes), 0, atol=1e-5)
  np.testing.assert_allclose(jnp.var(y, axes), 1, atol=1e-4)


def test_position_norm_keeps_a_change_in_its_place():
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
  module = layers.Norm(0)
  params = module.init(jax.random.key(0), x)
  changed = module.apply(params, x.at[0, 0, 0, 1].add(1.0))
  gap = np.abs(changed - module.apply(params, x)).max(-1)[0]
  assert gap[0, 0] > 0.01
  assert gap.sum() == gap[0, 0]


def test_groups_that_do_not_divide_are_named():
  with pytest.raises(ValueError, match='groups=3 does not divide 8'):
    layers.Norm(3).init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))
