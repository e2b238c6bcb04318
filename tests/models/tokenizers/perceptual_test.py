import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from scar_jax.models.tokenizers import perceptual

WIDTHS = (64, 64, 128, 128, *(256,) * 3, *(512,) * 6)
TORCH = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def weights(vgg='features', lin='lin{}'):
  rng = np.random.default_rng(0)
  state, c = {}, 3
  for index, width in zip(TORCH, WIDTHS, strict=True):
    name = f'{vgg}.{index}'
    scale = (2 / (9 * c)) ** 0.5
    draw = rng.standard_normal((width, c, 3, 3), np.float32)
    state[f'{name}.weight'] = draw * np.float32(scale)
    state[f'{name}.bias'] = rng.standard_normal(width).astype(np.float32) / 10
    c = width
  for i, width in enumerate((64, 128, 256, 512, 512)):
    state[f'{lin.format(i)}.model.1.weight'] = rng.random(
      (1, width, 1, 1), np.float32
    )
  state['classifier.0.weight'] = np.zeros((2, 2), np.float32)
  return state


def by_hand(state, image):
  """The five feature maps of one image, by plain loops over taps."""
  x = (image - np.array([-0.030, -0.088, -0.188])) / [0.458, 0.448, 0.450]
  maps = []
  for n, index in enumerate(TORCH):
    if n in (2, 4, 7, 10):
      h, w, c = x.shape
      x = x.reshape(h // 2, 2, w // 2, 2, c).max((1, 3))
    kernel = state[f'features.{index}.weight']
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    h, w = x.shape[:2]
    x = state[f'features.{index}.bias'] + sum(
      padded[i : i + h, j : j + w] @ kernel[:, :, i, j].T
      for i in range(3)
      for j in range(3)
    )
    x = np.maximum(x, 0)
    if n in (1, 3, 6, 9, 12):
      norm = np.sqrt((x**2).sum(-1, keepdims=True))
      maps.append(x / (norm + 1e-10))
  return maps


@pytest.fixture(scope='module')
def state():
  return weights()


def test_lpips_equals_a_computation_by_hand(state, tmp_path):
  path = str(tmp_path / 'lpips.safetensors')
  save_file(state, path)
  params = perceptual.load_lpips(path)
  rng = np.random.default_rng(1)
  a, b = rng.uniform(-1, 1, (2, 1, 16, 16, 3)).astype(np.float32)
  got = jax.jit(perceptual.LPIPS().apply)({'params': params}, a, b)
  want = sum(
    (((x - y) ** 2) @ state[f'lin{i}.model.1.weight'].reshape(-1)).mean()
    for i, (x, y) in enumerate(
      zip(by_hand(state, a[0]), by_hand(state, b[0]), strict=True)
    )
  )
  np.testing.assert_allclose(got, [want], rtol=1e-3)
  assert want > 0.01


def test_missing_lpips_tensors_are_listed(tmp_path):
  path = str(tmp_path / 'lpips.npz')
  np.savez(path, **{'net.slice1.0.bias': np.zeros(64, np.float32)})
  with pytest.raises(ValueError, match=r'without conv1_1\.kernel, .*lin4'):
    perceptual.load_lpips(path)
  with pytest.raises(ValueError, match=r"'x\.pth'; accepted: \.safetensors"):
    perceptual.load_lpips('x.pth')


def test_embedded_distance_of_flat_colours_and_of_structure():
  truth = jnp.zeros((2, 16, 16, 3))
  distance = jax.jit(perceptual.embedded_distance, static_argnames='features')
  zero = distance(truth, truth)
  np.testing.assert_array_equal(zero, [0.0, 0.0])
  shifted = truth.at[0].add(0.3)
  # Filters have no mean, but a border pads with zeros: leave them out.
  got = distance(shifted, truth, features=0)
  np.testing.assert_allclose(got, [2 * 0.3 / 3, 0.0], rtol=1e-5)
  edge = truth.at[1, :, 8:].set(0.3)
  got = distance(edge, truth)
  assert got[0] == 0.0
  assert got[1] > 0.1


def test_embedded_distance_has_finite_gradients_at_equal_images():
  x = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3), minval=-1)
  grad = jax.jit(jax.grad(lambda y: perceptual.embedded_distance(y, x).sum()))(
    x
  )
  assert np.all(np.isfinite(grad))
