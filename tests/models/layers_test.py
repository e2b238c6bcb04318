"""Shared layers: stored rotary tables, norms, projections, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models import layers as nl


def _table(grid: int, head_dim: int, rows: int, xp=np):
  cells = np.indices((grid, grid)).reshape(2, -1).T.astype(np.float32)
  positions = np.concatenate([np.zeros((rows, 2), np.float32), cells])
  zero = np.arange(len(positions)) < rows
  return nl.rope_table(xp.asarray(positions), head_dim, zero_rows=zero)


@pytest.mark.parametrize(
  ('name', 'args'),
  [
    ('rope_4_16_cls1', (4, 16, 1)),
    ('rope_4_16_cls6', (4, 16, 6)),
    ('rope_16_64_cls1', (16, 64, 1)),
  ],
)
@pytest.mark.parametrize('xp', [np, jnp])
def test_rotary_tables_equal_the_reference(golden, name, args, xp):
  expected = golden('gpt_c2i')[1][name]
  ours = np.stack(_table(*args, xp=xp), -1)
  np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_rotation_equals_the_reference(golden):
  arrays = golden('gpt_c2i')[1]
  ours = nl.apply_rope(jnp.asarray(arrays['rope_in']), _table(4, 16, 1))
  np.testing.assert_allclose(ours, arrays['rope_out'], atol=1e-6)
  assert not np.any(ours[:, 0])


def test_rotation_takes_one_table_per_sample():
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, 8))
  positions = jnp.array([[[0, 0], [1, 2], [3, 1]], [[2, 2], [0, 1], [5, 4]]])
  both = nl.apply_rope(x, nl.rope_table(positions, 8))
  for row in range(2):
    one = nl.apply_rope(x[row : row + 1], nl.rope_table(positions[row], 8))
    np.testing.assert_allclose(both[row], one[0], atol=1e-6)


def test_products_of_rotated_vectors_depend_on_the_offset_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 1, 16))
  cells = np.array([[0, 0], [0, 1], [2, 1], [3, 3]], np.float32)

  def products(shift):
    rope = nl.rope_table(cells + np.float32(shift), 16)
    return jnp.einsum(
      'blhk,bshk->ls', nl.apply_rope(q, rope), nl.apply_rope(k, rope)
    )

  np.testing.assert_allclose(products(0), products(7), atol=1e-4)


def test_head_dim_of_three_billion_parameters_has_25_pairs_per_axis():
  cos, sin = nl.rope_table(np.ones((1, 2), np.float32), 100)
  assert cos.shape == sin.shape == (1, 50)
  np.testing.assert_allclose(cos[0, :25], cos[0, 25:])
  np.testing.assert_allclose(cos[0, 0], np.cos(1.0), rtol=1e-6)


def test_head_dim_must_be_a_multiple_of_four():
  with pytest.raises(ValueError, match=r'head dim 10 .*multiples of 4'):
    nl.rope_table(np.zeros((1, 2), np.float32), 10)


def test_rms_norm_casts_before_the_scale():
  x = jnp.array([[3.0, 4.0]])
  layer = nl.RMSNorm(eps=0.5)
  ours = layer.apply({'params': {'scale': jnp.array([2.0, 10.0])}}, x)
  rms = np.sqrt(12.5 + 0.5)
  np.testing.assert_allclose(ours, [[6 / rms, 40 / rms]], rtol=1e-6)
  low = nl.RMSNorm(dtype='bfloat16').apply({'params': {'scale': x[0]}}, x)
  assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize('shape', [(1, 5, 8), (1, 1, 5, 8), (2, 1, 8), (1, 8)])
def test_norms_do_without_leading_axes_of_one(shape):
  x = jax.random.normal(jax.random.key(0), shape)
  params = {'params': {'scale': jnp.arange(1.0, 9.0)}}

  def both(x):
    return nl.RMSNorm().apply(params, x), nl.layer_norm(x, 1e-5)

  for found, expected in zip(both(x), both(x.reshape(-1, 8)), strict=True):
    assert found.shape == shape
    np.testing.assert_array_equal(found.reshape(-1, 8), expected)
  ndim = 3 if shape[0] > 1 else 2
  assert nl.squeezed(x).ndim == ndim


def test_layer_norm_has_no_parameters():
  ours = nl.layer_norm(jnp.array([[1.0, 3.0]]), 0.0)
  np.testing.assert_allclose(ours, [[-1.0, 1.0]])


def test_swiglu_by_hand():
  kernels = {'w1': [[2.0]], 'w3': [[3.0]], 'w2': [[5.0]]}
  params = {n: {'kernel': jnp.array(k)} for n, k in kernels.items()}
  ours = nl.SwiGLU(1).apply({'params': params}, jnp.ones((1, 1, 1)))
  silu = 2 / (1 + np.exp(-2.0))
  np.testing.assert_allclose(ours, [[[silu * 3 * 5]]], rtol=1e-6)


def test_gelu_mlp_uses_the_tanh_form():
  layer = nl.GeluMLP(1, 1)
  params = {
    'fc1': {'kernel': jnp.ones((1, 1)), 'bias': jnp.ones(1)},
    'fc2': {'kernel': jnp.full((1, 1), 2.0), 'bias': jnp.full(1, 0.5)},
  }
  ours = layer.apply({'params': params}, jnp.full((1, 1, 1), 0.5))
  x = 1.5
  inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
  expected = 2 * 0.5 * x * (1 + np.tanh(inner)) + 0.5
  np.testing.assert_allclose(ours, [[[expected]]], rtol=1e-6)


def test_embed_clips_ids_outside_the_table():
  params = {'params': {'embedding': jnp.array([[1.0], [2.0]])}}
  ours = nl.Embed(2, 1).apply(params, jnp.array([0, 1, 7, -1]))
  assert ours[:, 0].tolist()[:3] == [1.0, 2.0, 2.0]
  assert np.isfinite(ours).all()


def test_dropout_keeps_the_mean_and_scales_what_stays():
  x = jnp.ones((64, 64))
  ours = nl.dropout(x, 0.25, jax.random.key(0))
  assert np.unique(ours).tolist() == [0.0, np.float32(4 / 3)]
  assert abs(float(ours.mean()) - 1) < 0.03
  assert nl.dropout(x, 0.25, None) is x


def test_drop_path_drops_whole_samples():
  x = jnp.ones((512, 2, 3))
  ours = nl.drop_path(x, 0.2, jax.random.key(0))
  per_sample = np.unique(np.asarray(ours).reshape(512, -1), axis=1)
  assert per_sample.shape == (512, 1)
  assert np.unique(ours).tolist() == [0.0, 1.25]
  assert abs(float(ours.mean()) - 1) < 0.06
  np.testing.assert_array_equal(nl.drop_path(x, 0.0, jax.random.key(0)), x)


@pytest.mark.parametrize(
  ('device', 'dtype'),
  [('tpu', 'bfloat16'), ('cpu', 'bfloat16'), ('cpu', 'float32')],
)
def test_a_rotation_by_a_product_is_exact(device, dtype, monkeypatch):
  x = jax.random.normal(jax.random.key(0), (2, 17, 4, 16), dtype)
  weight = jax.random.normal(jax.random.key(1), x.shape)

  def found(device):
    monkeypatch.setattr(nl, 'platform', lambda: device)

    def loss(x):  # one for each device: JAX keeps what it has traced
      return jnp.sum(weight * nl.apply_rope(x, _table(4, 16, 1)))

    by_product = 'dot_general' in str(jax.make_jaxpr(loss)(x))
    assert by_product == (device != 'gpu')
    return nl.apply_rope(x, _table(4, 16, 1)), jax.grad(loss)(x)

  ours, want = found(device), found('gpu')
  np.testing.assert_array_equal(*(np.float32(o[0]) for o in (ours, want)))
  # The gradient is summed in another order.
  tol = 1e-2 if dtype == 'bfloat16' else 1e-5
  np.testing.assert_allclose(
    *(np.float32(o[1]) for o in (ours, want)), rtol=tol, atol=tol
  )
