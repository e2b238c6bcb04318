"""Encoders whose layers lie one by one give what stacked ones give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy

from scar_jax.models import unstacked
from scar_jax.models.encoders.semantic import (
  EncoderConfig,
  SemanticEncoder,
  encoder_params,
)
from scar_jax.models.unstacked import restack, unstack
from scar_jax.sharding import unbox

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))


def _encoder(**fields):
  fields = dict(image_size=16, patch=4, width=8, heads=2, table=4) | fields
  encoder = SemanticEncoder(EncoderConfig(**fields))
  images = jnp.asarray(IMAGES, jnp.float32)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  return encoder, noisy(unbox(shapes['params'])), images


@pytest.mark.parametrize(
  'fields',
  [
    {'kind': 'dinov2', 'depth': 5, 'features': 'last4'},
    {'kind': 'vit', 'depth': 3, 'features': '1', 'layerscale': False},
    {'kind': 'clip', 'depth': 2, 'norm_eps': 1e-5, 'registers': 0},
  ],
  ids=lambda fields: fields['kind'],
)
def test_features_of_layers_apart(fields, monkeypatch):
  encoder, params, images = _encoder(**fields)
  assert 'layers' in encoder_params(params)['network']  # too small to matter
  monkeypatch.setattr(unstacked, '_LARGE', 0)
  apart = encoder_params(params)
  names = {n for n in apart['network'] if n.startswith('layer')}
  assert names == {f'layer_{i}' for i in range(fields['depth'])}
  want, out = (
    jax.jit(encoder.apply)({'params': p}, images) for p in (params, apart)
  )
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  assert 'kernel_turned' in apart['network']['layer_0']['mlp']['fc1']
  again = {'network': restack(unstack(params['network']))}
  jax.tree.map(np.testing.assert_array_equal, again, params)
  # Layers in another order are another network.
  other = unstack(params['network'])
  other['layer_0'], other['layer_1'] = other['layer_1'], other['layer_0']
  other = encoder.apply({'params': {'network': other}}, images)
  assert np.abs(other - want).max() > 1e-2


def test_what_has_no_stack_stays_as_it_is(monkeypatch):
  monkeypatch.setattr(unstacked, '_LARGE', 0)
  params = {'network': {'layers_0': {'w': jnp.ones(3)}}}
  assert encoder_params(params)['network'] is params['network']
