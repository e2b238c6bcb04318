import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax import objectives
from scar_jax.convert.llamagen_vq import convert
from scar_jax.convert.parity_vq import nhwc
from scar_jax.models.tokenizers.vq import (
  VQConfig,
  VQModel,
  straight_through,
  vq_config,
)

MULTS = {'vq16': (1, 1, 1, 2, 1), 'vq8': (1, 1, 2, 1)}
TINY = VQConfig(
  codes=16, code_dim=4, ch=8, ch_mult=(1, 2), res_blocks=1, z_channels=8,
  groups=4, attn=True,
)  # fmt: skip


@pytest.fixture(scope='module', params=['vq8', 'vq16'])
def reference(request, golden):
  weights, arrays = golden(request.param)
  cfg = VQConfig(codes=64, ch=32, ch_mult=MULTS[request.param], z_channels=32)
  variables = {'params': convert(cfg, weights)}
  model = VQModel(cfg)
  out = jax.jit(model.apply)(variables, nhwc(arrays['image']))
  return model, variables, arrays, out


def test_ids_latents_and_images_match_the_reference(reference):
  _, _, a, out = reference
  np.testing.assert_array_equal(out.ids, a['indices'])
  np.testing.assert_allclose(out.raw, nhwc(a['latent']), atol=1e-4)
  np.testing.assert_allclose(out.codes, nhwc(a['quant_entry']), atol=1e-6)
  np.testing.assert_allclose(out.images, nhwc(a['decoded']), atol=2e-4)


def test_encode_and_decode_tokens_match_the_reference(reference):
  model, variables, a, _ = reference
  table = model.apply(variables, method='table')
  np.testing.assert_allclose(table, a['codebook_normed'], atol=1e-6)
  ids, latent = jax.jit(lambda v, x: model.apply(v, x, method='encode'))(
    variables, nhwc(a['image'])
  )
  np.testing.assert_array_equal(ids, a['indices'])
  np.testing.assert_allclose(jnp.linalg.norm(latent, axis=-1), 1, atol=1e-5)
  images = jax.jit(lambda v, x: model.apply(v, x, method='decode_tokens'))(
    variables, ids
  )
  np.testing.assert_allclose(images, nhwc(a['decoded_from_code']), atol=2e-4)


def test_encoder_output_matches_the_reference(reference):
  model, variables, a, _ = reference
  out = jax.jit(
    lambda v, x: model.apply(v, x, method=lambda m, x: m.encoder(x))
  )(variables, nhwc(a['image']))
  np.testing.assert_allclose(out, nhwc(a['enc_out']), atol=1e-4)


def test_quantiser_losses_and_gradients_match_the_reference(reference):
  model, variables, a, _ = reference

  def total(raw, codebook):
    params = {'params': {**variables['params'], 'codebook': codebook}}
    ids, latent, distances = model.apply(params, raw, method='quantize')
    codes = model.apply(params, ids, method='lookup')
    terms = (
      objectives.codebook_loss(latent, codes),
      objectives.commitment_loss(latent, codes),
      0.1 * objectives.entropy_loss(distances),
    )
    return sum(terms), terms

  args = nhwc(a['latent']), jnp.asarray(variables['params']['codebook'])
  (_, terms), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(*args)
  for term, name in zip(terms, ('vq', 'commit', 'entropy'), strict=True):
    np.testing.assert_allclose(term, a[f'train_{name}_loss'], rtol=1e-4)
  for grad, want in zip(
    grads, (nhwc(a['grad_latent']), a['grad_codebook']), strict=True
  ):
    np.testing.assert_allclose(grad, want, atol=1e-3 * np.abs(want).max())


def test_straight_through_gradient_matches_the_reference(reference):
  model, variables, a, _ = reference

  def weighted(raw):
    ids, latent, _ = model.apply(variables, raw, method='quantize')
    codes = model.apply(variables, ids, method='lookup')
    through = straight_through(latent, codes)
    return jnp.sum(through * nhwc(a['st_weight']))

  grad = jax.grad(weighted)(nhwc(a['latent']))
  want = nhwc(a['st_grad_latent'])
  np.testing.assert_allclose(grad, want, atol=1e-3 * np.abs(want).max())


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
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), images))['params']

  def loss(params, mix):
    out = model.apply({'params': params}, images, mix=mix)
    return jnp.mean(out.images**2) + mix * jnp.mean(out.codes**2 * out.raw)

  grads = jax.jit(jax.grad(loss))(params, 1.0)
  still = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(grads)
    if not np.any(np.abs(g) > 0)
  ]
  # A key bias adds the same to all logits of a query.
  assert all("['k']['bias']" in name for name in still), still
  off = jax.jit(jax.grad(loss))(params, 0.0)
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
