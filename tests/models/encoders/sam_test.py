import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax import sharding
from scar_jax.convert import sam as names
from scar_jax.models.encoders import sam
from scar_jax.models.encoders.sam import SAM, SAMConfig, sam_config

TINY = SAMConfig(
  patch=16, width=48, depth=3, heads=4, hidden=96, table=7, window=3,
  global_layers=(1,), neck=16,
)  # fmt: skip


@pytest.fixture(scope='module')
def reference(golden):
  tensors, arrays = golden('sam')
  images = arrays['pixel_values'].astype(np.float32)
  variables = {'params': names.convert(TINY, tensors)}
  return variables, arrays, np.transpose(images, (0, 2, 3, 1))


def _apply(cfg, variables, images, **kw):
  return jax.jit(lambda v, x: SAM(cfg).apply(v, x, **kw))(variables, images)


def test_windows_come_back_and_are_filled_with_zeros():
  x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
  windows = sam.to_windows(x, 3)
  assert windows.shape == (2 * 2 * 3, 3, 3, 3)
  np.testing.assert_array_equal(windows[1], x[0, :3, 3:6])
  assert not windows[2, :, 1:].any()  # right of the map
  assert not windows[3, 2:].any()  # below it
  np.testing.assert_array_equal(sam.from_windows(windows, (5, 7)), x)


def test_attention_on_a_rectangle_other_than_the_table():
  """Term by term, with tables resized as torch resizes a line."""
  attention = sam._Attention(heads=2, table=4, dtype='float32')
  x = np.asarray(jax.random.normal(jax.random.key(1), (1, 2, 3, 8)))
  shapes = jax.eval_shape(attention.init, jax.random.key(0), x)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: rng.normal(size=p.shape), sharding.unbox(shapes['params'])
  )
  got = jax.jit(attention.apply)({'params': params}, x)

  def line(table, n):
    """Offsets -(n - 1) to n - 1, sampled at the middles of equal parts."""
    at = (np.arange(2 * n - 1) + 0.5) * 7 / (2 * n - 1) - 0.5
    columns = [np.interp(at, np.arange(7), c) for c in table.T]
    return np.stack(columns, axis=-1)

  rows, cols = line(params['rel_h'], 2), line(params['rel_w'], 3)
  qkv = np.einsum('hwd,dink->ihwnk', x[0], params['qkv']['kernel'])
  q, k, v = qkv + params['qkv']['bias'][:, None, None]
  want = np.zeros((2, 3, 8)) + params['out']['bias']
  for head, i, j in np.ndindex(2, 2, 3):
    query = q[i, j, head]
    logits = np.array(
      [
        [
          query @ k[a, b, head] / 2
          + query @ rows[i - a + 1]
          + query @ cols[j - b + 2]
          for b in range(3)
        ]
        for a in range(2)
      ]
    )
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    value = np.einsum('ab,abk->k', weights, v[:, :, head])
    want[i, j] += value @ params['out']['kernel'][head]
  np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close(reference):
  variables, arrays, images = reference
  half = dataclasses.replace(TINY, dtype='bfloat16')
  out = _apply(half, variables, images)
  assert out.prenorm.dtype == jnp.bfloat16
  a = np.asarray(out.prenorm, np.float32).ravel()
  b = arrays['hidden_3'].ravel()
  assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


# What is left of the published totals 93,735,472, 312,342,832 and 641,090,608
# without prompt encoder (6,220) and mask decoder (4,058,340).
@pytest.mark.parametrize(
  ('size', 'count'),
  [('B', 89_670_912), ('L', 308_278_272), ('H', 637_026_048)],
)
def test_parameter_count(size, count):
  cfg = sam_config(size)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(SAM(cfg).init, jax.random.key(0), image)
  leaves = jax.tree.leaves(sharding.unbox(shapes))
  assert sum(x.size for x in leaves) == count
  axes = sharding.logical_axes(shapes['params'])['layers_0']['attn']
  assert axes['qkv']['kernel'] == ('embed', None, 'heads', 'head_dim')


def test_errors_name_what_is_accepted():
  with pytest.raises(ValueError, match="'vit_b'; accepted: B, L, H"):
    sam_config('vit_b')
  with pytest.raises(ValueError, match='width=48 is not divisible by heads=5'):
    dataclasses.replace(TINY, heads=5)
  with pytest.raises(ValueError, match='window=0; accepted: 1 or more'):
    dataclasses.replace(TINY, window=0)
  with pytest.raises(ValueError, match=r'layer \[3\] of 3; accepted: 0 to 2'):
    dataclasses.replace(TINY, global_layers=(3,))
  image = jnp.zeros((1, 16, 16, 3))
  with pytest.raises(ValueError, match=r'layer \[5\] of 3; accepted: 0 to 2'):
    SAM(TINY).init(jax.random.key(0), image, layers=(5,))
