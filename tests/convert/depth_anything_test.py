"""Names of Depth Anything in both namings, and what its parts compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy

from scar_jax.convert import depth_anything, families
from scar_jax.convert.common import flatten, torch_shape
from scar_jax.models.annotators import depth
from scar_jax.models.encoders.dinov2 import DINOv2Config
from scar_jax.models.resize import resize
from scar_jax.sharding import unbox

CFG = depth.DepthConfig(
  network=DINOv2Config(patch=2, width=64, depth=4, heads=1, table=4),
  layers=(0, 1, 2, 3),
  necks=(3, 4, 5, 6),
  width=8,
  head=5,
)


def _shapes():
  image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  init = depth.DepthAnything(CFG).init
  return unbox(jax.eval_shape(init, jax.random.key(0), image)['params'])


def _state(hugging_face):
  """Random tensors under the names of a checkpoint."""
  shapes, rng, state = flatten(_shapes()), np.random.default_rng(0), {}
  for entry in depth_anything.table(CFG, hugging_face):
    shape = shapes[entry.path].shape
    layers = shape[0] if entry.stacked else 1
    one = torch_shape(entry, shape[1:] if entry.stacked else shape)
    for i in range(layers):
      for name in entry.names(i if entry.stacked else None):
        state[name] = rng.normal(size=one).astype(np.float32)
  return state


@pytest.mark.parametrize('hugging_face', [True, False])
def test_a_checkpoint_is_recognised_and_used_up(hugging_face):
  state = _state(hugging_face)
  assert families.detect_family(state).name == 'depth-anything'
  unused = 'neck.fusion_stage.layers.0.residual_layer1.convolution1.weight'
  if not hugging_face:
    unused = 'depth_head.scratch.refinenet4.resConfUnit1.conv1.weight'
  state[unused] = np.zeros((8, 8, 3, 3), np.float32)
  cfg = depth_anything.detect(state, image_size=518)
  assert cfg == CFG
  params = depth_anything.convert(cfg, state)
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, _shapes())
  state['head.more'] = np.zeros(1, np.float32)
  with pytest.raises(ValueError, match=r'head\.more'):
    depth_anything.convert(cfg, state)


def test_published_sizes_have_names():
  for size in 'SBL':
    assert depth_anything.size(depth.depth_config(size)) == size
  assert depth_anything.size(CFG) == 'custom'
  with pytest.raises(ValueError, match="depth size 'g'; accepted: S, B, L"):
    depth.depth_config('g')


def test_depth_of_any_number_of_patches():
  model = depth.DepthAnything(CFG)
  params = noisy(_shapes(), scale=0.3)
  images = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
  made = jax.jit(model.apply)({'params': params}, images)
  assert made.shape == (2, 8, 12)
  assert (made >= 0).all()
  assert np.std(made) > 0


def test_an_enlarging_convolution_puts_each_value_in_its_place():
  cell = depth._Reassemble(3, 2)
  x = jax.random.normal(jax.random.key(0), (1, 2, 2, 4))
  params = noisy(unbox(cell.init(jax.random.key(1), x)['params']))
  made = np.asarray(cell.apply({'params': params}, x))
  y = np.asarray(x @ params['project']['kernel'][0, 0])
  y = y + params['project']['bias']
  for row in range(4):
    for column in range(4):
      tap = params['kernel'][:, :, row % 2, column % 2]
      want = y[0, row // 2, column // 2] @ tap + params['bias']
      np.testing.assert_allclose(made[0, row, column], want, rtol=1e-4)


def test_corner_pixels_stay_at_the_corners():
  x = np.arange(3, dtype=np.float32)[None, :, None, None] * np.ones(
    (1, 3, 2, 1)
  )
  made = np.asarray(resize(x, (5, 2), 'bilinear_corners'))[0, :, 0, 0]
  np.testing.assert_allclose(made, [0, 0.5, 1, 1.5, 2], atol=1e-6)
