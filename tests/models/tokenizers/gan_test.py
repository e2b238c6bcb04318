import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.models.tokenizers.gan import PatchDiscriminator


def test_patch_scores_and_sizes_of_the_reference():
  disc = PatchDiscriminator()
  variables = jax.eval_shape(
    lambda k, x: disc.init(k, x, train=True),
    jax.random.key(0),
    jnp.zeros((1, 256, 256, 3)),
  )
  params = nn.unbox(variables)['params']
  assert params['conv_0']['kernel'].shape == (4, 4, 3, 64)
  assert params['conv_3']['kernel'].shape == (4, 4, 256, 512)
  assert set(params['conv_3']) == {'kernel'}
  assert sum(x.size for x in jax.tree.leaves(params)) == 2_765_633
  scores = jax.eval_shape(
    lambda v, x: disc.apply(v, x, train=False),
    nn.unbox(variables),
    jnp.zeros((1, 256, 256, 3)),
  )
  assert scores.shape == (1, 30, 30, 1)


def test_initialisation_and_running_statistics():
  disc = PatchDiscriminator(ch=16, layers=1)
  x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  init = jax.jit(functools.partial(disc.init, train=True))
  variables = nn.unbox(init(jax.random.key(0), x))
  kernel = variables['params']['conv_1']['kernel']
  np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
  scale = variables['params']['norm_1']['scale']
  assert 0.005 < np.std(scale) < 0.05
  np.testing.assert_allclose(np.mean(scale), 1.0, atol=0.02)
  run = jax.jit(
    functools.partial(disc.apply, mutable=['batch_stats']),
    static_argnames='train',
  )
  _, new = run(variables, x, train=True)
  assert not np.array_equal(
    new['batch_stats']['norm_1']['mean'],
    variables['batch_stats']['norm_1']['mean'],
  )
  _, kept = run(variables, x, train=False)
  jax.tree.map(
    np.testing.assert_array_equal, kept['batch_stats'], variables['batch_stats']
  )


def test_images_too_small_for_the_patches_are_named():
  with pytest.raises(ValueError, match=r'16x16 is too small.*32 or more'):
    PatchDiscriminator().init(
      jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=True
    )
