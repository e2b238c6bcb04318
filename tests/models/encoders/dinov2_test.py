import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax import sharding
from scar_jax.convert import dinov2 as names
from scar_jax.models.encoders.blocks import fit_positions, patch_grid
from scar_jax.models.encoders.dinov2 import DINOv2, DINOv2Config, dinov2_config

TINY = DINOv2Config(patch=14, width=36, depth=4, heads=3, table=5)
CONFIGS = {
  'dinov2': TINY,
  'dinov2_reg': dataclasses.replace(TINY, registers=4, pos_interp='size_aa'),
  'dinov2_swiglu': dataclasses.replace(TINY, depth=2, ffn='swiglu'),
  'dinov2_hf': dataclasses.replace(TINY, pos_interp='size'),
}


def _load(golden, name):
  tensors, arrays = golden(name)
  image = np.transpose(arrays['image'].astype(np.float32), (0, 2, 3, 1))
  return {'params': names.convert(CONFIGS[name], tensors)}, arrays, image


def test_hidden_patches_are_not_seen(golden):
  variables, _, image = _load(golden, 'dinov2')
  run = jax.jit(DINOv2(TINY).apply)
  image = image[:1, :28, :28]
  hidden = jnp.array([[True, False, False, False]])
  token = jnp.ones((36,))
  a = run(variables, image, hidden, token).patches
  other = jnp.asarray(image).at[:, :14, :14].add(1.0)
  b = run(variables, other, hidden, token).patches
  np.testing.assert_array_equal(a, b)
  assert jnp.abs(a - run(variables, image).patches).max() > 0.1


@pytest.mark.parametrize(
  ('size', 'count'),
  [
    ('S', 22_056_576),
    ('B', 86_580_480),
    ('B_reg', 86_583_552),
    ('L', 304_368_640),
    ('g', 1_136_480_768),
  ],
)
def test_parameter_count(size, count):
  cfg = dinov2_config(size)
  image = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
  shapes = jax.eval_shape(DINOv2(cfg).init, jax.random.key(0), image)
  leaves = jax.tree.leaves(sharding.unbox(shapes))
  # The published model also has a mask token, which only its training reads.
  assert sum(x.size for x in leaves) + cfg.width == count
  axes = sharding.logical_axes(shapes['params'])['layers']['attn']
  assert axes['qkv']['kernel'] == (
    *('layers', 'embed', None, 'heads', 'head_dim'),
  )


def test_546_pixels_are_39_columns():
  assert patch_grid((14, 546), 14) == (1, 39)
  table = jnp.zeros((37, 37, 2))
  for method in ('offset0.1', 'size', 'size_aa'):
    assert fit_positions(table, (1, 39), method).shape == (1, 39, 2)
  shapes = jax.eval_shape(
    lambda x: DINOv2(TINY).init_with_output(jax.random.key(0), x)[0],
    jax.ShapeDtypeStruct((1, 28, 546, 3), jnp.float32),
  )
  assert shapes.patches.shape == (1, 2 * 39, 36)


def test_errors_name_what_is_accepted():
  with pytest.raises(ValueError, match=r'39x546 .* near: 28, 42'):
    patch_grid((39, 546), 14)
  with pytest.raises(ValueError, match="'H'; accepted: S, B, L, g"):
    dinov2_config('H')
  with pytest.raises(ValueError, match="ffn='glu'; accepted: mlp, swiglu"):
    DINOv2Config(ffn='glu')
  with pytest.raises(ValueError, match='width=36 is not divisible by heads=5'):
    DINOv2Config(width=36, heads=5)
  with pytest.raises(ValueError, match="'half'; accepted: offset"):
    fit_positions(jnp.zeros((2, 2, 1)), (3, 3), 'half')
  with pytest.raises(ValueError, match=r'layer \[4\] of 4; accepted: 0 to 3'):
    DINOv2(TINY).init(jax.random.key(0), jnp.zeros((1, 14, 14, 3)), layers=(4,))


def test_converter_reads_every_naming(golden):
  tensors, _ = golden('dinov2')
  want = names.convert(TINY, tensors)
  chunked = {
    n.replace('blocks.', 'blocks.7.', 1): v for n, v in tensors.items()
  }
  same = names.convert(TINY, chunked)
  jax.tree.map(np.testing.assert_array_equal, same, want)
  tensors, _ = golden('dinov2_hf')
  prefixed = {f'dinov2.{n}': v for n, v in tensors.items()}
  assert names.convert(CONFIGS['dinov2_hf'], prefixed)
  del tensors['layernorm.bias']
  with pytest.raises(ValueError, match=r"missing: \['layernorm.bias'\]"):
    names.convert(CONFIGS['dinov2_hf'], tensors)
