import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax import sharding
from scar_jax.models import prefill
from scar_jax.models.prefill import Compressor, PrefixConfig

D = 12
SHAPES = {
  # compress, k: (prefix grid, convs, has restorer, projection inputs)
  ('full', 1): ((8, 4), 0, False, 6),
  ('full', 2): ((4, 2), 1, True, 6),
  ('full', 4): ((2, 1), 2, True, 6),
  ('conv_resize', 2): ((4, 2), 1, False, 6),
  ('conv', 4): ((2, 1), 2, True, 6),
  ('resize', 2): ((4, 2), 0, False, 6),
  ('unshuffle', 2): ((4, 2), 0, False, 24),
  ('unshuffle', 4): ((2, 1), 0, False, 96),
  ('none', 2): ((8, 4), 0, False, 6),
  ('vq', 2): ((8, 4), 0, False, None),
  ('vq_pool', 2): ((4, 2), 1, False, None),
}


@pytest.mark.parametrize(('compress', 'k'), list(SHAPES))
def test_variants(compress, k):
  grid, convs, restores, inputs = SHAPES[compress, k]
  width = D if compress.startswith('vq') else 6
  cfg = PrefixConfig(compress=compress, k=k, grid=(8, 4), width=width, out=D)
  assert cfg.out_grid == grid
  assert cfg.length == grid[0] * grid[1]
  assert cfg.restores == restores
  features = jax.random.normal(jax.random.key(0), (2, 8, 4, width))
  model = Compressor(cfg)
  (prefix, restored), variables = jax.eval_shape(
    model.init_with_output, jax.random.key(1), features
  )
  params = nn.unbox(variables).get('params', {})
  assert prefix.shape == (2, cfg.length, D)
  assert (restored is not None) == restores
  if restores:
    assert restored.shape == features.shape
    stages = ['conv_in', 'conv_in1'][:convs]
    assert set(params['restore']) == {*stages, 'conv_out'}
  assert len(params.get('compress', {})) == convs
  if inputs:
    assert params['proj']['kernel'].shape == (inputs, D)
  else:
    assert 'proj' not in params
  if compress in ('none', 'vq') or k == 1:
    compressed = model.apply({}, features, method='compress')
    np.testing.assert_array_equal(compressed, features)


def test_init_follows_torch_defaults():
  cfg = PrefixConfig(grid=(4, 4), width=32, out=64)
  init = jax.jit(Compressor(cfg).init)
  params = nn.unbox(init(jax.random.key(0), jnp.zeros((1, 4, 4, 32))))['params']
  largest = np.abs(params['proj']['kernel']).max()
  assert 0.95 * 32**-0.5 < largest <= 32**-0.5
  for part in (params['compress']['conv0'], params['restore']['conv_in']):
    bound = (9 * 32) ** -0.5
    assert 0.95 * bound < np.abs(part['kernel']).max() <= bound
    assert 0 < np.abs(part['bias']).max() <= bound
    np.testing.assert_allclose(
      np.std(part['kernel']), bound / 3**0.5, rtol=0.05
    )


def test_stride_two_convolution_sees_the_first_pixel_in_its_middle_tap():
  cfg = PrefixConfig(compress='conv', grid=(4, 4), width=1, out=1)
  kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
  params = {'compress': {'conv0': {'kernel': kernel, 'bias': jnp.zeros(1)}}}
  delta = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
  out = Compressor(cfg).apply({'params': params}, delta, method='compress')
  np.testing.assert_array_equal(out[0, :, :, 0], [[4, 0], [0, 0]])


def test_shrink_takes_the_middle_of_each_block():
  x = jnp.arange(64.0).reshape(1, 8, 8, 1)
  half = np.asarray(x[0, :, :, 0]).reshape(4, 2, 4, 2).mean((1, 3))
  np.testing.assert_array_equal(prefill.shrink(x, 2)[0, :, :, 0], half)
  quarter = [[13.5, 17.5], [45.5, 49.5]]
  np.testing.assert_array_equal(prefill.shrink(x, 4)[0, :, :, 0], quarter)


def test_pixel_unshuffle_inverts_and_orders_channels():
  x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
  packed = prefill.pixel_unshuffle(x, 2)
  assert packed.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(packed[0, 1, 2, 2 * 4 + 2 + 0], x[0, 3, 4, 2])
  np.testing.assert_array_equal(prefill.pixel_shuffle(packed, 2), x)


def test_layernorm_follows_the_projection():
  cfg = PrefixConfig(grid=(4, 4), width=3, out=16, norm='layernorm')
  features = 5 + jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
  (prefix, _), _ = Compressor(cfg).init_with_output(jax.random.key(1), features)
  np.testing.assert_allclose(np.mean(prefix, -1), 0, atol=1e-5)
  np.testing.assert_allclose(np.std(prefix, -1), 1, atol=1e-2)


def test_off_has_no_prefix():
  cfg = PrefixConfig(compress='off', grid=(7, 7))
  assert cfg.out_grid is None
  assert cfg.length == 0


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'compress': 'fulll'}, r"prefix.compress='fulll'; accepted: full, conv_"),
    ({'k': 3}, r'prefix.k=3; accepted: 1, 2, 4'),
    ({'norm': 'rms'}, r"prefix.norm='rms'; accepted: none, layernorm"),
    ({'grid': (7, 8)}, r'prefix.k=2 does not divide .*7x8; accepted: 1 '),
    ({'grid': (6, 6), 'k': 4}, r'k=4 does not divide .*6x6; accepted: 1, 2'),
    ({'compress': 'vq', 'width': 7}, r'with width 7; accepted: .* 1280'),
  ],
)
def test_impossible_settings_name_the_accepted_ones(fields, message):
  with pytest.raises(ValueError, match=message):
    PrefixConfig(**fields)


def test_wrong_features_are_an_error():
  cfg = PrefixConfig(grid=(4, 4), width=3, out=16)
  with pytest.raises(ValueError, match=r'\(4, 2, 3\) do not fit .*\(4, 4, 3\)'):
    Compressor(cfg).init(jax.random.key(0), jnp.zeros((1, 4, 2, 3)))


def test_places_tell_equal_cells_apart():
  cfg = PrefixConfig(
    'resize', k=2, grid=(4, 4), width=6, out=16, norm='layernorm'
  )
  features = jnp.ones((1, 4, 4, 6)) * jnp.arange(6)
  placed = dataclasses.replace(cfg, places='sincos')
  variables = Compressor(cfg).init(jax.random.key(0), features)
  plain, _ = Compressor(cfg).apply(variables, features)
  marked, _ = Compressor(placed).apply(variables, features)
  assert np.ptp(plain, axis=1).max() < 1e-5
  apart = np.linalg.norm(marked[0][:, None] - marked[0], axis=-1)
  assert apart[np.triu_indices(4, 1)].min() > 1
  np.testing.assert_allclose(np.std(marked - plain), 0.5, rtol=0.2)


@pytest.mark.parametrize('axes', ['fsdp:8', 'data:2 fsdp:4', 'data:2 fsdp:2'])
def test_convolutions_keep_to_the_rows_of_their_device(axes):
  """FSDP splits kernels; pictures must not be brought together for that."""
  cfg = PrefixConfig(k=2, grid=(4, 4), width=64, out=8)
  sizes = {a: int(n) for a, n in (axis.split(':') for axis in axes.split())}
  ways = math.prod(sizes.values())
  sizes['tensor'] = 8 // ways
  model, mesh = Compressor(cfg), sharding.make_mesh(sizes)
  x = jax.ShapeDtypeStruct(
    (40, 4, 4, 64), jnp.float32, sharding=sharding.batch_sharding(mesh)
  )

  def loss(params, x):
    compressed = model.apply(params, x, method='compress')
    return (model.apply(params, compressed, method='restore') ** 2).sum()

  one = jnp.zeros((1, 4, 4, 64))
  boxed = jax.eval_shape(model.init, jax.random.key(0), one)
  places = sharding.tree_shardings(boxed, mesh)
  params = jax.tree.map(
    lambda s, place: s.update(sharding=place), sharding.unbox(boxed), places
  )
  split = places['params']['restore']['conv_in']['kernel'].spec
  assert split[-1] == ('fsdp' if ways == 8 else ('fsdp', 'tensor'))
  with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(places, x.sharding))
    text = step.lower(params, x).compile().as_text()
  assert f'f32[{40 // ways},4,4,64]' in text
  assert not re.findall(r'\[(?:\d,)?40,\d.*', text)
  # Nor is the gradient of a kernel added up whole on every device.
  sums = [line for line in text.splitlines() if ' all-reduce(' in line]
  assert not [line for line in sums if '[3,3,64,256]' in line]
  assert 'reduce-scatter(' in text


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])  # the latter: products
@pytest.mark.parametrize('axes', [{'fsdp': 4}, {'data': 2, 'fsdp': 2}])
def test_split_convolutions_are_those_of_one_device(
  axes, platform, monkeypatch
):
  cfg = PrefixConfig(k=2, grid=(4, 4), width=8, out=8)
  model, x = Compressor(cfg), jax.random.normal(jax.random.key(1), (8, 4, 4, 8))
  params = nn.meta.unbox(model.init(jax.random.key(0), x))

  def loss(params, x):
    prefix, restored = model.apply(params, x)
    return (prefix**2).mean() + ((restored - x) ** 2).mean()

  alone = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
  monkeypatch.setattr(prefill, 'platform', lambda: platform)
  with jax.set_mesh(sharding.make_mesh({**axes, 'tensor': 2})):
    split = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    alone,
    split,
  )
