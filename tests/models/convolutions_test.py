import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models.convolutions import batch_conv, product_conv


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
