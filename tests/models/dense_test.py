"""Linear maps: by hand, apart, in int8, turned, and in bfloat16 on CPUs."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models import dense
from scar_jax.models.dense import Dense, outputs_first
from scar_jax.sharding import unbox


def test_dense_over_several_axes_equals_einsum():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
  layer = Dense(
    (6, 7), ('heads', 'head_dim', 'embed', None), in_dims=2, use_bias=True
  )
  params = nn.unbox(layer.init(jax.random.key(1), x))
  params['params']['bias'] = jnp.arange(42.0).reshape(6, 7)
  expected = jnp.einsum('abcd,cdef->abef', x, params['params']['kernel'])
  expected += params['params']['bias']
  np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-5)


@pytest.mark.parametrize('int8', [False, True])
def test_products_apart_equal_parts_of_one(monkeypatch, int8):
  rows = jax.random.normal(jax.random.key(0), (2, 5, 6))
  axes = ('embed', None, 'heads', 'head_dim')
  whole = Dense((3, 2, 4), axes, use_bias=True)
  params = whole.init(jax.random.key(1), rows)['params']
  params = {k: v.unbox() for k, v in params.items()}
  params['bias'] += jax.random.normal(jax.random.key(2), (3, 2, 4))
  if int8:
    del params['kernel']
    params |= _int8_kernel((3, 2, 4), 6)
  apart = Dense((3, 2, 4), axes, use_bias=True, apart=True)
  # A kernel is not taken apart for fewer rows than it has.
  for platform, x, products in (
    ('cpu', rows, 1), ('tpu', rows, 3), ('tpu', rows[:, :3], 3),
    ('tpu', rows[:1], 1),
  ):  # fmt: skip
    monkeypatch.setattr(dense, 'platform', lambda p=platform: p)
    want = whole.apply({'params': params}, x)
    call = functools.partial(apart.apply, {'params': params})
    assert str(jax.make_jaxpr(call)(x)).count('dot_general[') == products
    ours = call(x)
    assert isinstance(ours, tuple)
    for i, part in enumerate(ours):
      np.testing.assert_allclose(part, want[:, :, i], atol=1e-5)


def _int8_kernel(outputs, *inputs):
  """Parameters with outputs first."""
  keys = jax.random.split(jax.random.key(3))
  kernel = jax.random.randint(keys[0], (*outputs, *inputs), -127, 128, jnp.int8)
  scale = jax.random.uniform(keys[1], outputs, minval=0.5, maxval=1.5) / 127
  return {'kernel_int8': kernel, 'kernel_scale': scale}


@pytest.mark.parametrize(
  ('device', 'atol'), [('cpu', 0.03), ('gpu', 1e-5), ('tpu', 1e-5)]
)
def test_int8_kernels_multiply_as_what_they_stand_for(
  device, atol, monkeypatch
):
  monkeypatch.setattr(dense, 'platform', lambda: device)
  params = _int8_kernel((4,), 2, 3)
  kernel = params['kernel_int8'] * params['kernel_scale'][:, None, None]
  layer = Dense((4,), (None,) * 3, in_dims=2)
  # Rows of zeros, and of far different sizes: CPUs round each by itself.
  rows = jax.random.normal(jax.random.key(0), (5, 2, 3))
  factors = jnp.array([0.0, 1e-3, 1.0, 10.0, 1e3])[:, None]
  ours = layer.apply({'params': params}, rows * factors[..., None])
  want = jnp.einsum('bij,fij->bf', rows, kernel, precision='highest')
  assert (ours[0] == 0).all()
  gap = np.abs(ours[1:] / factors[1:] - want[1:])
  assert gap.max() < atol
  assert (gap.max() > 1e-4) == (device == 'cpu')


def test_the_gradient_of_products_apart_is_put_together_at_once():
  rows = jax.random.normal(jax.random.key(0), (2, 5, 6))
  layer = Dense((3, 2, 4), (None,) * 4, apart=True)
  params = unbox(layer.init(jax.random.key(1), rows))

  def loss(params):
    q, k, v = layer.apply(params, rows)
    return jnp.sum(q * k + jnp.sin(v))

  text = str(jax.make_jaxpr(jax.grad(loss))(params))
  assert 'concatenate[' in text
  assert 'pad[' not in text


@pytest.mark.parametrize('width', [2, 9])  # of 4 x 3 inputs: fewer, more
@pytest.mark.parametrize('device', ['cpu', 'tpu'])
def test_gradients_of_a_product_are_those_of_einsum(device, width, monkeypatch):
  monkeypatch.setattr(dense, 'platform', lambda: device)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 3, 4)), jnp.float32)
  layer = Dense((2, width), (None, None, None, None), in_dims=2)
  params = unbox(layer.init(jax.random.key(0), x))

  def ours(params, x):
    return (jnp.tanh(layer.apply(params, x)) ** 2).sum()

  def plain(params, x):
    y = jnp.einsum('blhk,hkpq->blpq', x, params['params']['kernel'])
    return (jnp.tanh(y) ** 2).sum()

  if device == 'cpu':  # 12 inputs: the narrower factor is turned round
    text = str(jax.make_jaxpr(jax.grad(ours))(params, x))
    shape = (12, 2 * width) if width > 6 else (2 * width, 12)
    assert f':f32[{shape[0]},{shape[1]}] = dot_general' in text
  found = jax.jit(jax.grad(ours, (0, 1)))(params, x)
  want = jax.jit(jax.grad(plain, (0, 1)))(params, x)
  for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('features', 'axes', 'apart'),
  [((5,), 1, False), ((3, 2, 4), 1, True), ((5,), 2, False)],
)
@pytest.mark.parametrize('device', ['cpu', 'gpu', 'tpu'])
def test_turned_kernels_are_the_same_map(
  device, features, axes, apart, monkeypatch
):
  monkeypatch.setattr(dense, 'platform', lambda: device)
  x = jax.random.normal(jax.random.key(0), (2, 7, 2, 3)[: 2 + axes])
  layer = Dense(
    features,
    (None,) * (axes + len(features)),
    in_dims=axes,
    use_bias=True,
    apart=apart,
  )
  params = unbox(layer.init(jax.random.key(1), x)['params'])
  params['bias'] += jax.random.normal(jax.random.key(2), features)
  turned = outputs_first({'layer': params, 'scale': jnp.ones(3)})
  assert set(turned['layer']) == {'kernel_turned', 'bias'}
  assert turned['layer']['kernel_turned'].shape[: len(features)] == features
  want = layer.apply({'params': params}, x)
  ours = layer.apply({'params': turned['layer']}, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, want
  )


@pytest.mark.parametrize('rows', [1, 2, 32, 33])
@pytest.mark.parametrize('small', [False, True])
def test_few_rows_read_a_turned_kernel_as_it_lies(rows, small):
  x = jax.random.normal(jax.random.key(0), (rows, 64))
  layer = Dense((48,), (None, None))
  kernel = jax.random.normal(jax.random.key(1), (48, 64))
  if small:
    kernel = jnp.round(kernel * 40).astype(jnp.int8)
    params = {'kernel_int8': kernel, 'kernel_scale': jnp.full(48, 0.5)}
    want = (x @ kernel.T.astype(jnp.float32)) * 0.5
  else:
    params, want = {'kernel_turned': kernel}, x @ kernel.T
  program = jax.jit(lambda params, x: layer.apply({'params': params}, x))
  found = program(params, x)
  tolerance = 0.01 * np.abs(want).max() if small else 1e-4
  np.testing.assert_allclose(found, want, atol=tolerance)
  # Compiled: of what shape the product is, that is which factor is the left.
  text = program.lower(params, x).compile().as_text()
  [shape] = re.findall(r'= \w+\[([\d,]+)\]\S* dot\(', text)
  assert shape == (f'48,{rows}' if rows <= 32 else f'{rows},48')


def test_what_has_no_bias_is_not_turned():
  params = {'norm': {'scale': jnp.ones(3)}, 'w1': {'kernel': jnp.ones((2, 3))}}
  jax.tree.map(np.testing.assert_array_equal, outputs_first(params), params)


@pytest.mark.parametrize('width', [24, 160])  # of 64 inputs: fewer, more
@pytest.mark.parametrize('wide', [False, True])
def test_bfloat16_products_on_cpus_come_out_in_float32(width, wide):
  # Else the compiler widens the factors.
  keys = jax.random.split(jax.random.key(0), 3)
  x, kernel, pull = (
    jax.random.normal(key, shape).astype(jnp.bfloat16)
    for key, shape in zip(
      keys, ((2, 33, 64), (64, width), (2, 33, width)), strict=True
    )
  )
  out_dtype = 'float32' if wide else 'bfloat16'
  layer = Dense(
    (width,), (None, None), use_bias=True, dtype='bfloat16', out_dtype=out_dtype
  )
  bias = jax.random.normal(keys[0], (width,))

  def loss(x, kernel, to):
    x, kernel, pull_to = (y.astype(to) for y in (x, kernel, pull))
    if to == jnp.bfloat16:
      y = layer.apply({'params': {'kernel': kernel, 'bias': bias}}, x)
      assert y.dtype == out_dtype
    else:
      y = x @ kernel + bias
    return jnp.sum((y * pull_to).astype(jnp.float32))

  both = (jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, kernel, to)
          for to in (jnp.bfloat16, jnp.float32))  # fmt: skip
  for ours, want in zip(*both, strict=True):
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      *map(np.float32, (ours, want)), rtol=0.02, atol=0.1
    )
  text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)), 2)(x, kernel, jnp.bfloat16))
  products = [line for line in text.splitlines() if 'dot_general[' in line]
  assert len(products) == 3
  assert not [line for line in products if ':f32[' not in line]
  # The narrower factor of a sum over rows is transposed, if that is the input.
  assert text.count('pad[') == (2 if width > 64 else 0)
