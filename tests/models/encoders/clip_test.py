import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax import sharding
from scar_jax.convert import clip as names
from scar_jax.models.encoders.clip import (
  CLIP,
  CLIPConfig,
  CLIPText,
  CLIPTextConfig,
  CLIPVision,
  CLIPVisionConfig,
  clip_config,
)

TINY = CLIPConfig(
  CLIPVisionConfig(patch=14, width=48, depth=3, heads=4, hidden=96, table=4),
  CLIPTextConfig(vocab=99, length=20, width=32, depth=3, heads=4, hidden=64),
  joint=24,
)


@pytest.fixture(scope='module')
def reference(golden):
  tensors, arrays = golden('clip')
  return names.convert(TINY, tensors), arrays


def _apply(model, params, *inputs, **kw):
  return jax.jit(lambda p, x: model.apply({'params': p}, *x, **kw))(
    params, inputs
  )


def test_no_token_sees_what_follows(reference):
  params, arrays = reference
  model, ids = CLIPText(TINY.text), arrays['input_ids'][:1]
  other = np.where(np.arange(20) < 7, ids, (ids + 3) % 97)
  a, b = (_apply(model, params['text'], x)[0] for x in (ids, other))
  np.testing.assert_array_equal(a[:, :7], b[:, :7])
  assert np.abs(a[:, 7:] - b[:, 7:]).max() > 0.1


def _count(model, *inputs):
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return sum(x.size for x in jax.tree.leaves(sharding.unbox(shapes)))


# Totals as published; the tower alone as Hugging Face's `CLIPVisionModel`.
@pytest.mark.parametrize(
  ('size', 'total', 'vision'),
  [
    ('B/32', 151_277_313, 87_456_000),
    ('B/16', 149_620_737, 85_799_424),
    ('L/14', 427_616_513, 303_179_776),
    ('L/14@336', 427_944_193, 303_507_456),
  ],
)
def test_parameter_count(size, total, vision):
  cfg = clip_config(size)
  side = cfg.vision.patch
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  assert _count(CLIP(cfg), image, ids) == total
  assert _count(CLIPVision(cfg.vision), image) == vision


def test_errors_name_what_is_accepted():
  with pytest.raises(ValueError, match="'B'; accepted: B/32, B/16, L/14"):
    clip_config('B')
  with pytest.raises(
    ValueError, match="act='relu'; accepted: quick_gelu, gelu"
  ):
    CLIPTextConfig(act='relu')
  with pytest.raises(ValueError, match='width=768 is not divisible by heads=7'):
    CLIPVisionConfig(heads=7)
  with pytest.raises(ValueError, match=r'21 CLIP text ids .*accepted: 1 to 20'):
    CLIPText(TINY.text).init(jax.random.key(0), jnp.zeros((1, 21), jnp.int32))
