import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax import sharding
from scar_jax.convert import vit as names
from scar_jax.models.encoders.vit import ViT, ViTConfig, vit_config

CLOSE = dict(rtol=1e-4, atol=1e-4)
TINY = ViTConfig(
  patch=8, width=36, depth=4, heads=3, table=8, norm_eps=1e-12, pooler=True
)


@pytest.fixture(scope='module')
def reference(golden):
  tensors, arrays = golden('vit')
  return {'params': names.convert(TINY, tensors)}, arrays


def _images(arrays, name='pixel_values'):
  return np.transpose(arrays[name], (0, 2, 3, 1))


def _apply(cfg, variables, images, **kw):
  return jax.jit(lambda v, x: ViT(cfg).apply(v, x, **kw))(variables, images)


def test_keys_of_a_single_layer(reference):
  variables, arrays = reference
  first = jax.tree.map(lambda x: x[:1], variables['params']['layers'])
  one = {'params': {**variables['params'], 'layers': first}}
  cfg = dataclasses.replace(TINY, depth=1)
  keys = _apply(cfg, one, _images(arrays), method='last_keys')
  x = arrays['hidden_0']
  x = x - x.mean(-1, keepdims=True)
  norm, qkv = first['norm1'], first['attn']['qkv']
  x = x / x.std(-1, keepdims=True) * norm['scale'][0] + norm['bias'][0]
  kernel = qkv['kernel'][0, :, 1].reshape(36, 36)
  want = x @ kernel + qkv['bias'][0, 1].reshape(36)
  np.testing.assert_allclose(keys, want, **CLOSE)


# Counts of timm and Hugging Face without classifier and pooler.
@pytest.mark.parametrize(
  ('size', 'fields', 'count'),
  [
    ('S/16', dict(table=14), 21_665_664),
    ('S/16', {}, 21_811_584),  # "21.8M" in the paper's table: 384 pixels
    ('B/16', dict(table=14), 85_798_656),
    ('B/16', dict(table=14, pooler=True), 86_389_248),
    ('B/16', {}, 86_090_496),
    ('L/16', dict(table=14), 303_301_632),
    ('S/8', {}, 21_670_272),
    ('B/8', {}, 85_807_872),
  ],
)
def test_parameter_count(size, fields, count):
  cfg = vit_config(size, **fields)
  side = 2 * cfg.patch
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)

  def init(image):
    method = 'pool' if cfg.pooler else '__call__'
    return ViT(cfg).init(jax.random.key(0), image, method=method)

  leaves = jax.tree.leaves(sharding.unbox(jax.eval_shape(init, image)))
  assert sum(x.size for x in leaves) == count


def test_errors_name_what_is_accepted():
  with pytest.raises(ValueError, match="'B'; accepted: S/16, B/16"):
    vit_config('B')
  plain = dataclasses.replace(TINY, pooler=False)
  with pytest.raises(ValueError, match=r'pooler=False .*accepted: pooler=True'):
    ViT(plain).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), method='pool')
