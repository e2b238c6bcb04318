import dataclasses

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
  clip_score,
)

CLOSE = dict(rtol=1e-4, atol=1e-4)
TINY = CLIPConfig(
  CLIPVisionConfig(patch=14, width=48, depth=3, heads=4, hidden=96, table=4),
  CLIPTextConfig(vocab=99, length=20, width=32, depth=3, heads=4, hidden=64),
  joint=24,
)


@pytest.fixture(scope='module')
def reference(golden):
  tensors, arrays = golden('clip')
  images = np.transpose(arrays['pixel_values'], (0, 2, 3, 1))
  return names.convert(TINY, tensors), arrays, images


def _apply(model, params, *inputs, **kw):
  return jax.jit(lambda p, x: model.apply({'params': p}, *x, **kw))(
    params, inputs
  )


def _compare(ours, arrays):
  for key, value in ours.items():
    np.testing.assert_allclose(value, arrays[key], **CLOSE, err_msg=key)


def test_matches_the_reference_image_tower(reference):
  params, arrays, images = reference
  model = CLIPVision(TINY.vision)
  out = _apply(model, params['vision'], images, layers=(1,))
  ours = {
    'vision_last_hidden_state': out.prenorm,
    'vision_hidden_2': out.layers[0],
    'vision_pooled': out.cls,
  }
  _compare(ours, arrays)


def test_matches_the_reference_text_tower(reference):
  params, arrays, _ = reference
  model, params = CLIPText(TINY.text), params['text']
  ids, mask = arrays['input_ids'], arrays['attention_mask'].astype(bool)
  masked, pooled = _apply(model, params, ids, mask)
  plain, plain_pooled = _apply(model, params, ids)
  ours = {
    'text_last_hidden_state': masked,
    'text_pooled': pooled,
    'text_last_hidden_state_nomask': plain,
    'text_pooled_nomask': plain_pooled,
  }
  _compare(ours, arrays)


def test_matches_the_reference_scores(reference):
  params, arrays, images = reference
  model, ids = CLIP(TINY), arrays['input_ids']
  image = _apply(model, params, images, method='embed_images')
  text = _apply(model, params, ids, method='embed_text')
  ours = {
    'image_embeds': image,
    'text_embeds': text,
    'logits_per_image': _apply(model, params, images, ids),
  }
  _compare(ours, arrays)
  score = clip_score(image, text)
  np.testing.assert_allclose(score, arrays['clip_score'], rtol=1e-4, atol=1e-3)
  assert score.min() == 0  # a negative cosine


def test_no_token_sees_what_follows(reference):
  params, arrays, _ = reference
  model, ids = CLIPText(TINY.text), arrays['input_ids'][:1]
  other = np.where(np.arange(20) < 7, ids, (ids + 3) % 97)
  a, b = (_apply(model, params['text'], x)[0] for x in (ids, other))
  np.testing.assert_array_equal(a[:, :7], b[:, :7])
  assert np.abs(a[:, 7:] - b[:, 7:]).max() > 0.1


def _exact_gelu(cfg, params):
  return dataclasses.replace(cfg, act='gelu')


def _swap_key_and_value(cfg, params):
  qkv = params['layers']['attn']['qkv']
  qkv['kernel'] = qkv['kernel'][:, :, [0, 2, 1]]
  return cfg


def _shifted_positions(cfg, params):
  params['pos_embed'] = np.roll(params['pos_embed'], 1, axis=0)
  return cfg


@pytest.mark.parametrize(
  'change', [_exact_gelu, _swap_key_and_value, _shifted_positions]
)
@pytest.mark.parametrize('tower', ['vision', 'text'])
def test_a_wrong_conversion_is_seen(reference, change, tower):
  params, arrays, images = reference
  changed = jax.tree.map(np.array, params[tower])
  cfg = change(getattr(TINY, tower), changed)
  if tower == 'vision':
    ours = _apply(CLIPVision(cfg), changed, images).cls
  else:
    ours = _apply(CLIPText(cfg), changed, arrays['input_ids'])[1]
  assert np.abs(ours - arrays[f'{tower}_pooled']).max() > 1e-2


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
