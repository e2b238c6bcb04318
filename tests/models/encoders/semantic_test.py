import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.convert import clip, sam, vit
from scar_jax.convert import dinov2 as names
from scar_jax.models.encoders import semantic
from scar_jax.models.encoders.semantic import (
  EncoderConfig,
  SemanticEncoder,
  encoder_around,
  encoder_config,
)

# The encoder inside the official SCAR model's fixture.
OFFICIAL = EncoderConfig(
  image_size=112, normalize='pm1', width=8, depth=4, heads=2, table=5
)


def _nhwc(x):
  return np.transpose(x, (0, 2, 3, 1))


def test_the_last_layer_by_its_number(golden):
  tensors, arrays = golden('scar_prefill')
  state = {k: v for k, v in tensors.items() if k.startswith('dinov2.')}
  cfg = dataclasses.replace(OFFICIAL, features='3')
  params = {'network': names.convert(cfg.network(), state)}
  image = _nhwc(arrays['source_image'])
  out = jax.jit(SemanticEncoder(cfg).apply)({'params': params}, image)
  assert out.shape[1:] == (8, 8, semantic.encoder_width(cfg))
  flat = np.asarray(out).reshape(2, 64, -1)
  expected = arrays['dino_last_source']
  np.testing.assert_allclose(flat, expected, rtol=1e-4, atol=1e-4)


def test_prepare_normalizes():
  white = jnp.ones((1, 112, 112, 3))
  cfg = dataclasses.replace(OFFICIAL, normalize='imagenet')
  np.testing.assert_allclose(
    semantic.prepare(cfg, white)[0, 0, 0],
    [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225],
    rtol=1e-6,
  )


def test_which_layers():
  def layers(depth, features):
    return semantic.encoder_layers(
      EncoderConfig(depth=depth, features=features)
    )

  assert layers(12, 'last4') == (2, 5, 8, 11)
  assert layers(24, 'last4') == (5, 11, 17, 23)
  assert layers(40, 'last4') == (9, 19, 29, 39)
  assert layers(12, '7') == (7,)
  assert layers(12, 'last') == ()


def _layer_norm(x, eps=1e-6, scale=1.0, bias=0.0):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + bias


def _affine(tensors, name):
  return tensors[f'{name}.weight'], tensors[f'{name}.bias']


def _features_of_vit(tensors, arrays):
  layers = [arrays[f'hidden_{i}'][:, 1:] for i in (1, 2, 3, 4)]
  norm = _affine(tensors, 'layernorm')
  return {
    'last': arrays['last_hidden_state'][:, 1:],
    'last4': _layer_norm(np.concatenate(layers, -1)),
    '1': _layer_norm(layers[1], 1e-12, *norm),
  }


def _features_of_clip(tensors, arrays):
  norm = _affine(tensors, 'vision_model.post_layernorm')
  return {
    'last': _layer_norm(arrays['vision_last_hidden_state'][:, 1:], 1e-5, *norm),
    '1': _layer_norm(arrays['vision_hidden_2'][:, 1:], 1e-5, *norm),
  }


def _features_of_sam(tensors, arrays):
  layers = [arrays[f'hidden_{i}'] for i in (1, 2, 3)]
  return {'last': _layer_norm(layers[2]), '1': _layer_norm(layers[1])}


@pytest.mark.parametrize('name', ['vit', 'clip', 'sam'])
def test_features_of_other_networks(golden, name):
  tensors, arrays = golden(name)
  module, hints, wanted = {
    'vit': (vit, {'heads': 3, 'image_size': 64}, _features_of_vit),
    'clip': (clip, {'heads': 4, 'image_size': 56}, _features_of_clip),
    'sam': (sam, {'image_size': 112}, _features_of_sam),
  }[name]
  # The reference's images are normalised already.
  cfg = dataclasses.replace(module.detect(tensors, **hints), normalize='pm1')
  if name == 'vit':
    cfg = dataclasses.replace(cfg, norm_eps=1e-12)
  assert cfg.kind == name
  params = {'network': module.convert(cfg, tensors)}
  images = _nhwc(arrays['pixel_values'].astype(np.float32))
  for features, want in wanted(tensors, arrays).items():
    this = dataclasses.replace(cfg, features=features)
    out = jax.jit(SemanticEncoder(this).apply)({'params': params}, images)
    grid, width = semantic.encoder_grid(this), semantic.encoder_width(this)
    assert out.shape == (2, *grid, width)
    want = want.reshape(out.shape)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)


def test_sizes_of_other_networks():
  # The paper's ablation: 32 x 32 features of 512-pixel images.
  for size in ('vit-S/16', 'vit-B/16', 'sam-B', 'clip-B/16'):
    cfg = encoder_config(size, image_size=512, features='last4')
    assert semantic.encoder_grid(cfg) == (32, 32)
    assert semantic.encoder_width(cfg) == 4 * cfg.width
  scales = {'vit-B/16': 'pm1', 'sam-B': 'imagenet', 'clip-L/14': 'clip'}
  for size, scale in scales.items():
    cfg = encoder_config(size)
    assert semantic.encoder_grid(cfg) == (16, 16)
    assert cfg.normalize == scale
    assert encoder_around(cfg.network()) == cfg


def test_a_full_size_sam_gives_features():
  cfg = encoder_config('sam-B', image_size=512, features='last4')
  images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
  out, _ = jax.eval_shape(
    SemanticEncoder(cfg).init_with_output, jax.random.key(0), images
  )
  assert out.shape == (2, 32, 32, 3072)


def test_sizes():
  tiny = encoder_config('tiny')
  assert semantic.encoder_grid(tiny) == (8, 8)
  assert semantic.encoder_width(tiny) == 128
  large = encoder_config('B', image_size=448, features='last4')
  assert semantic.encoder_grid(large) == (32, 32)
  assert semantic.encoder_width(large) == 3072
  assert encoder_config('S_reg').network().pos_interp == 'size_aa'


def test_registers_are_no_features():
  cfg = encoder_config('tiny', depth=1, width=8, heads=1, registers=2)
  model = SemanticEncoder(cfg)
  images = jnp.zeros((1, 16, 16, 3))
  init = model.init_with_output
  out, _ = jax.eval_shape(init, jax.random.key(0), images)
  assert out.shape == (1, 8, 8, 8)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(kind='resnet'), "kind='resnet'; accepted: dinov2"),
    (dict(resize='lanczos'), "resize='lanczos'; accepted: nearest"),
    (dict(normalize='mean'), "normalize='mean'; accepted: imagenet"),
    (dict(features='12'), "features='12' with 12 layers; accepted: last"),
    (dict(depth=2, features='last4'), "features='last4' with 2 layers"),
    (dict(image_size=225), '225x225 pixels'),
    (dict(kind='clip', registers=4), "registers=4 with kind='clip', .*: 0 "),
    (dict(window=7), "window=7 with kind='dinov2', which has no such field"),
    (dict(kind='sam', window=0), 'window=0; accepted: 1 or more'),
    (dict(kind='clip', act='relu'), "act='relu'; accepted: quick_gelu"),
  ],
)
def test_errors_name_what_is_accepted(fields, message):
  with pytest.raises(ValueError, match=message):
    EncoderConfig(**fields)


def test_an_unknown_size_lists_all():
  with pytest.raises(
    ValueError, match=r"'clip-B'; accepted: tiny, S, .*clip-B/16, .*sam-B"
  ):
    encoder_config('clip-B')
