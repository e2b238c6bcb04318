import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models import convolutions
from scar_jax.models.convolutions import (
  batch_conv,
  each_picture,
  product_conv,
)


@pytest.mark.parametrize('stride', [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize('grid', [(8, 6), (7, 5)])
def test_a_product_is_the_convolution(stride, grid):
  x = jax.random.normal(jax.random.key(0), (2, *grid, 3))
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
  padding = ((1, 1), (1, 1))

  def both(x, kernel):
    numbers = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
    return (
      product_conv(x, kernel, stride, padding, **numbers),
      batch_conv(x, kernel, stride, padding, **numbers),
    )

  ours, want = both(x, kernel)
  np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)
  grads = [
    jax.grad(lambda *a, i=i: jnp.sum(jnp.sin(both(*a)[i])), (0, 1))(x, kernel)
    for i in (0, 1)
  ]
  for ours, want in zip(*grads, strict=True):
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)


def test_cpus_take_large_pictures_one_by_one(monkeypatch):
  seen = []

  def network(x):
    seen.append(len(x))
    return {'map': jnp.sin(x), 'mean': x.mean((1, 2, 3))}

  x = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))
  want = network(x)

  def batches(pixels, rows=3):
    seen.clear()
    out = each_picture(network, x[:rows], pixels)
    assert out.keys() == want.keys()
    for name, value in want.items():
      np.testing.assert_allclose(out[name], value[:rows], rtol=1e-6, atol=1e-6)
    return set(seen)

  assert batches(2**15 - 1) == {3}
  assert batches(2**15) == {1}
  assert batches(2**15, rows=1) == {1}
  with jax.set_mesh(jax.make_mesh((2,), ('data',))):
    assert batches(2**15) == {3}
  with jax.set_mesh(jax.make_mesh((1,), ('data',))):
    assert batches(2**15) == {1}
  monkeypatch.setattr(convolutions, 'platform', lambda: 'tpu')
  assert batches(2**15) == {3}
