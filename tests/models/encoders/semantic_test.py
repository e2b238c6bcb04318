import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.convert import dinov2 as names
from scar_jax.models.encoders import semantic
from scar_jax.models.encoders.semantic import (
  EncoderConfig,
  SemanticEncoder,
  encoder_config,
)

# The encoder inside the official SCAR model's fixture.
OFFICIAL = EncoderConfig(
  image_size=112, normalize='pm1', width=8, depth=4, heads=2, table=5
)


def _nhwc(x):
  return np.transpose(x, (0, 2, 3, 1))


@pytest.mark.parametrize(
  ('name', 'features', 'want'),
  [
    ('scar_prefill', 'last4', 'dino_mid4'),
    ('scar_prefill', 'last', 'dino_last'),
    ('scar_prefill_1th', 'last', 'dino_last'),
    ('scar_prefill', '3', 'dino_last'),
  ],
)
def test_features_of_the_official_model(golden, name, features, want):
  tensors, arrays = golden(name)
  state = {k: v for k, v in tensors.items() if k.startswith('dinov2.')}
  cfg = dataclasses.replace(OFFICIAL, features=features)
  params = {'network': names.convert(cfg.network(), state)}
  model = SemanticEncoder(cfg)
  for side in ('source', 'target'):
    image = _nhwc(arrays[f'{side}_image'])
    out = model.apply({'params': params}, image)
    assert out.shape[1:] == (8, 8, semantic.encoder_width(cfg))
    flat = np.asarray(out).reshape(2, 64, -1)
    expected = arrays[f'{want}_{side}']
    np.testing.assert_allclose(flat, expected, rtol=1e-4, atol=1e-4)


def test_prepare_resizes_and_normalizes(golden):
  _, arrays = golden('scar_prefill')
  image = _nhwc(arrays['source_image'])
  plain = semantic.prepare(OFFICIAL, image)
  want = _nhwc(arrays['dino_in_source'])
  np.testing.assert_allclose(plain, want, rtol=0, atol=1e-5)
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
  out, _ = model.init_with_output(jax.random.key(0), images)
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
  ],
)
def test_errors_name_what_is_accepted(fields, message):
  with pytest.raises(ValueError, match=message):
    EncoderConfig(**fields)
