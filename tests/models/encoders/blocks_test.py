"""Attention with a bias: what CPUs compute is what other devices do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models.encoders import blocks


@pytest.mark.parametrize(
  ('dtype', 'atol'), [('float32', 1e-5), ('bfloat16', 0.05)]
)
@pytest.mark.parametrize('masked', [False, True])
def test_biased_attention_on_every_device(dtype, atol, masked, monkeypatch):
  keys = jax.random.split(jax.random.key(0), 5)
  q, k, v = (
    jax.random.normal(key, (2, length, 3, 8)).astype(dtype)
    for key, length in zip(keys, (4, 5, 5), strict=False)
  )
  bias = jax.random.normal(keys[3], (1, 3, 4, 5))
  mask = np.ones((2, 4, 5), bool)
  mask[0, 1, 2:], mask[1, 3] = False, False  # the last row sees nothing
  pull = jax.random.normal(keys[4], (2, 4, 3, 8))

  def loss(q, k, v, bias):
    given = dict(bias=bias, mask=mask) if masked else {}
    out = blocks.biased_attention(q, k, v, 0.3, **given)
    assert out.dtype == dtype
    return jnp.sum(out * pull), out

  def both(device):
    monkeypatch.setattr(blocks, 'platform', lambda: device)
    call = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    (_, out), grads = call(q, k, v, bias)
    return out, *grads

  for ours, want in zip(both('cpu'), both('tpu'), strict=True):
    ours, want = np.float32(ours), np.float32(want)
    np.testing.assert_allclose(ours, want, atol=atol)
  out, *_ = both('cpu')
  even = np.float32(v[1]).mean(0)
  assert np.allclose(np.float32(out[1, 3]), even, atol=atol) == masked
