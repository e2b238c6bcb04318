"""Training in bfloat16 on CPUs: every product runs, and learns the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy
from scar_setup import frozen_artifacts, scar_batch, scar_config

from scar_jax.sharding import unbox
from scar_jax.train.tasks import make_task

# Wide enough that XLA's CPU compiler hands products on to its libraries.
FIELDS = dict(
  model__width=64,
  model__heads=2,
  model__layers=2,
  model__resid_dropout=0.0,
  model__ffn_dropout=0.0,
  model__token_dropout=0.0,
  text__width=64,
  order__num_sets=2,
)


@pytest.mark.parametrize('order', ['raster', 'random', 'scale'])
@pytest.mark.parametrize('scan', [True, False])
def test_gradients_are_near_those_of_float32(order, scan):
  artifacts, batch = frozen_artifacts(order), scar_batch()

  def gradient(dtype):
    task = make_task(
      scar_config(
        order__name=order, model__scan=scan, model__dtype=dtype, **FIELDS
      ),
      artifacts,
    )
    init = functools.partial(task.init, batch=batch)
    shapes = jax.eval_shape(init, jax.random.key(0))['params']
    params = noisy(unbox(shapes), scale=0.1)
    key = jax.random.key(0)
    call = jax.value_and_grad(
      lambda p: task.loss(p, {}, task.frozen, batch, key, True), has_aux=True
    )
    (loss, _), grads = jax.jit(call)(params)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])
    assert flat.dtype == jnp.float32  # as the parameters are
    return float(loss), flat

  (want, wanted), (loss, grads) = (
    gradient(dtype) for dtype in ('float32', 'bfloat16')
  )
  assert loss != want
  np.testing.assert_allclose(loss, want, rtol=0.02)
  size = np.linalg.norm(wanted)
  assert np.linalg.norm(grads - wanted) < 0.1 * size
