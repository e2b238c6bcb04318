"""Attention of an encoder by a kernel, interpreted here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models.encoders import blocks


@pytest.mark.parametrize(('length', 'kernel'), [(130, True), (127, False)])
def test_the_kernel_of_a_tpu_equals_plain_attention(
  monkeypatch, length, kernel
):
  x = jax.random.normal(jax.random.key(0), (2, length, 16))
  model = blocks.SelfAttention(heads=2)
  params = model.init(jax.random.key(1), x)
  params = jax.tree.map(lambda p: p * 5 + 0.01, params)
  want = model.apply(params, x)
  monkeypatch.setattr(blocks, 'platform', lambda: 'tpu')
  made = str(jax.make_jaxpr(lambda x: model.apply(params, x))(x))
  assert ('pallas_call' in made) == kernel
  np.testing.assert_allclose(model.apply(params, x), want, atol=2e-5)
  # A mask is no set of positions: no kernel.
  mask = jnp.ones((1, length, length), bool)
  made = jax.make_jaxpr(lambda x: model.apply(params, x, mask))(x)
  assert 'pallas_call' not in str(made)
