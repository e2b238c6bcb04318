import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax import sharding
from scar_jax.convert import t5 as names
from scar_jax.models.encoders import t5
from scar_jax.models.encoders.t5 import T5Config, T5Encoder

TINY = T5Config(vocab=64, width=32, layers=2, heads=3, head_dim=16, ffn=64)


@pytest.fixture(scope='module')
def reference(golden):
  tensors, arrays = golden('t5')
  return {'params': names.convert(TINY, tensors)}, arrays


def test_buckets_on_the_logarithmic_steps():
  row = t5.relative_buckets(200, 32, 128)[0]  # keys to the right
  assert row[[0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 199]].tolist() == [
    0, 17, 23, 24, 25, 26, 27, 28, 29, 30, 31, 31, 31,
  ]  # fmt: skip
  column = t5.relative_buckets(200, 32, 128)[:, 0]  # and to the left
  assert column[[0, 7, 8, 16, 64, 199]].tolist() == [0, 7, 8, 10, 14, 15]


def test_padding_changes_nothing_and_an_empty_row_is_finite(reference):
  variables, _ = reference
  ids = jnp.array([[5, 9, 1, 0, 0], [0, 0, 0, 0, 0]])
  mask = ids > 0
  run = jax.jit(T5Encoder(TINY).apply)
  out = run(variables, ids, mask)
  other = run(variables, jnp.where(mask, ids, 7), mask)
  np.testing.assert_array_equal(out[0, :3], other[0, :3])
  assert jnp.isfinite(out).all()


def test_bfloat16_is_close(reference):
  variables, arrays = reference
  half = T5Config(**{**TINY.__dict__, 'dtype': 'bfloat16'})
  ids = arrays['input_ids'][:, :20]
  out = jax.jit(T5Encoder(half).apply)(variables, ids)
  assert out.dtype == jnp.bfloat16
  a, b = np.asarray(out, np.float32), arrays['last_hidden_state_nomask20']
  assert np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


@pytest.mark.parametrize(
  ('size', 'count'), [('flan-t5-xl', 1_223_527_424), ('byte', 362_240)]
)
def test_parameter_count(size, count):
  cfg = t5.t5_config(size)
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  shapes = jax.eval_shape(T5Encoder(cfg).init, jax.random.key(0), ids)
  leaves = jax.tree.leaves(sharding.unbox(shapes))
  assert sum(x.size for x in leaves) == count
  axes = sharding.logical_axes(shapes['params'])['layers']
  assert axes['q']['kernel'] == ('layers', 'embed', 'heads', 'head_dim')


def test_conversion_lists_what_does_not_fit(golden):
  tensors = dict(golden('t5')[0])
  tensors['encoder.block.0.layer.0.SelfAttention.q.weight'] = np.zeros((9, 32))
  del tensors['encoder.final_layer_norm.weight']
  tensors['surprise'] = np.zeros(3)
  with pytest.raises(ValueError, match='1 tensors missing') as error:
    names.convert(TINY, tensors)
  text = str(error.value)
  assert "unexpected: ['surprise']" in text
  assert (
    'SelfAttention.q.weight (9, 32) for layers/q/kernel (32, 3, 16)' in text
  )
  whole = golden('t5')[0] | {'decoder.x': np.zeros(1), 'lm_head.weight': 0}
  del whole['shared.weight']
  assert names.convert(TINY, whole)['embed'].shape == (64, 32)


def test_config_errors():
  with pytest.raises(ValueError, match="'xxl'; accepted: flan-t5-xl"):
    t5.t5_config('xxl')
  with pytest.raises(ValueError, match='buckets=6; accepted: a multiple of 4'):
    T5Config(buckets=6)
