import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import noisy

from scar_jax.models.tokenizers import layers, residual
from scar_jax.models.tokenizers.inverse import start_inverse
from scar_jax.models.tokenizers.msvq import MSVQModel
from scar_jax.models.tokenizers.msvq_config import msvq_config
from scar_jax.models.tokenizers.vq import VQConfig, VQModel, vq_config

TINY = VQConfig(
  codes=16, code_dim=4, ch=8, ch_mult=(1, 2), res_blocks=1, z_channels=8,
  groups=4, attn=True,
)  # fmt: skip


@pytest.mark.parametrize(
  ('size', 'count', 'downsample'),
  [('vq16', 71_883_403, 16), ('vq8', 70_109_835, 8)],
)
def test_full_sizes_have_the_published_parameter_counts(
  size, count, downsample
):
  cfg = vq_config(size)
  assert cfg.downsample == downsample
  shapes = jax.eval_shape(
    VQModel(cfg).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))
  )
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_tiny_makes_an_8x8_grid_at_32_pixels():
  model = VQModel(vq_config('tiny'))
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3))
  )
  ids, _ = jax.eval_shape(
    lambda v, x: model.apply(v, x, method='encode'),
    nn.unbox(variables),
    jnp.zeros((2, 32, 32, 3)),
  )
  assert ids.shape == (2, 8, 8)
  assert ids.dtype == jnp.int32


def test_training_pass_reaches_every_parameter_but_mix_0_skips_the_codes():
  images = jax.random.uniform(jax.random.key(1), (1, 4, 4, 3), minval=-1)
  model = VQModel(TINY)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  params = noisy(nn.unbox(shapes)['params'])

  def loss(params, mix):
    out = model.apply({'params': params}, images, mix=mix)
    return jnp.mean(out.images**2) + mix * jnp.mean(out.codes**2 * out.raw)

  run = jax.jit(jax.grad(loss))
  grads = run(params, 1.0)
  still = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(grads)
    if not np.any(np.abs(g) > 0)
  ]
  # A key bias adds the same to all logits of a query.
  assert all("['k']['bias']" in name for name in still), still
  off = run(params, 0.0)
  assert not np.any(off['codebook'])


def test_sizes_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match=r"'vq32'.*'tiny', 'vq16', 'vq8'"):
    vq_config('vq32')
  with pytest.raises(ValueError, match='groups=32 does not divide 24'):
    VQConfig(ch=24)
  with pytest.raises(ValueError, match=r"conv_impl='fft'.*'auto'"):
    VQConfig(conv_impl='fft')
  with pytest.raises(ValueError, match=r'30x32.*multiples of .* 16'):
    jax.eval_shape(
      VQModel(vq_config('vq16')).init,
      jax.random.key(0),
      jnp.zeros((1, 30, 32, 3)),
    )


def test_a_local_encoder_sees_the_pixels_of_a_token_and_keeps_distances():
  cfg = dataclasses.replace(vq_config('tiny'), codes=64)
  model = VQModel(cfg)
  images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), images))
  features = jax.jit(lambda x: model.apply(params, x, method='features'))
  raw = np.asarray(features(images))
  pixels = np.asarray(layers.space_to_depth(images, 4))
  latents, pixels = raw.reshape(32, -1), pixels.reshape(32, -1)
  gaps = [
    np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (latents, pixels)
  ]
  np.testing.assert_allclose(*gaps, atol=1e-4)
  other = images.at[0, 4:8, 8:12].add(0.5)
  moved = np.abs(features(other) - raw).max(-1)
  assert moved[0, 1, 2] > 0.1
  assert np.count_nonzero(moved) == 1


@pytest.mark.parametrize('sides', [(), (2, 4)])
def test_a_local_model_starts_as_its_own_inverse(sides):
  cfg: Any = vq_config('tiny', codes=64)
  if sides:
    cfg = msvq_config('tiny', codes=64, patch_nums=sides)
  model = MSVQModel(cfg) if sides else VQModel(cfg)
  images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
  fresh = jax.jit(model.init)(jax.random.key(0), images)['params']
  start = start_inverse(fresh)
  # Same tree, the logical axes included.
  assert jax.tree.structure(start) == jax.tree.structure(fresh)
  run = jax.jit(lambda x: model.apply({'params': start}, x, mix=0.0).images)
  unquantised = run(images)
  np.testing.assert_allclose(unquantised, images, atol=1e-5)
  if sides:  # phis leave codes as they are
    codes = jax.random.normal(jax.random.key(2), (2, 4, cfg.code_dim))
    added = model.apply({'params': start}, 0, codes, method='spread')
    np.testing.assert_allclose(added, residual.enlarge(codes, 4), atol=1e-5)
