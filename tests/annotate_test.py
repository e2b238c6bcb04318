"""Maps of pictures of many sizes, in few programs."""

import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.annotate import Annotator, make_annotator


def _bright(params, images):
  return params * (jnp.mean(images, axis=-1) + 1) / 2


def _annotator(batch=2):
  return Annotator(
    _bright, jnp.float32(1.0), 16, 8, lambda raw: np.rint(255 * raw), batch
  )


def _grey(height, width, level):
  return np.full((height, width, 3), level, np.uint8)


def test_every_picture_gets_a_map_of_its_size():
  sizes = [(20, 20), (40, 20), (21, 20), (19, 20), (20, 41)]
  pictures = [(i, _grey(*s, 50 * i)) for i, s in enumerate(sizes)]
  network = _annotator()
  made = dict(network(iter(pictures)))
  assert sorted(made) == [0, 1, 2, 3, 4]
  for i, size in enumerate(sizes):
    assert made[i].shape == size
    np.testing.assert_allclose(made[i], 50 * i, atol=1)
  # Squares, and 1:2 upright and across.
  assert network.compilations == 3


def test_the_network_sees_whole_units():
  network = _annotator()
  assert network.shape(20, 20) == (16, 16)
  assert network.shape(100, 160) == (16, 24)
  assert network.shape(5, 500) == (16, 1600)


def test_networks_are_named():
  with pytest.raises(
    ValueError, match="kind='canny'; accepted: hed, sketch, d"
  ):
    make_annotator('canny')
  with pytest.raises(
    ValueError, match='depth needs weights; accepted: an arti'
  ):
    make_annotator('depth')
