"""Perceptual distances between two image batches.

In: images `[B, H, W, 3]` in [-1, 1]. Out: one distance per sample `[B]`.
`embedded_distance` needs no weights and is the default; `LPIPS` is the VGG16
metric, with a loader for torchvision and lpips weights in one file.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import load_file

from scar_jax.models.tokenizers.layers import Conv, conv2d

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
# Width of each convolution; a new tuple starts after a 2x2 max pooling.
_VGG = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
# Index of each convolution in torchvision's `features`.
_TORCH_INDEX = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_NAMES = tuple(
  f'conv{s + 1}_{c + 1}' for s, w in enumerate(_VGG) for c in range(len(w))
)


def _mean_per_sample(x: Float[Array, 'B ...']) -> Float[Array, ' B']:
  return jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim)))


def _pool2(x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
  """2x2 mean; an odd last row or column is left out."""
  b, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def _random_filters(c_in: int, c_out: int, seed: int) -> np.ndarray:
  """Fixed 4x4 filters without mean: they answer to structure only."""
  rng = np.random.default_rng(seed)
  filters = rng.standard_normal((4, 4, c_in, c_out))
  filters -= filters.mean((0, 1), keepdims=True)
  norms = np.sqrt(np.square(filters).sum((0, 1, 2), keepdims=True))
  return (filters / norms).astype(np.float32)


def embedded_distance(
  images: Float[Array, 'B H W C'],
  truth: Float[Array, 'B H W C'],
  scales: int = 3,
  features: int = 16,
) -> Float[Array, ' B']:
  """Distance of edges, local colour and random features, without weights.

  At each scale (halved by 2x2 means): absolute differences of the image
  gradients and, below full size, of the colours themselves, which keeps flat
  areas exact; plus absolute differences of a fixed random convolution.

  Args:
    images: reconstruction.
    truth: same shape.
    scales: how often the size is halved, the full size included.
    features: random filters per scale; 0 leaves them out.
  """
  gap = images.astype(jnp.float32) - truth.astype(jnp.float32)
  total = jnp.zeros(images.shape[0], jnp.float32)
  a, b = images.astype(jnp.float32), truth.astype(jnp.float32)
  for scale in range(scales):
    if scale:
      gap, a, b = _pool2(gap), _pool2(a), _pool2(b)
      total += _mean_per_sample(jnp.abs(gap))
    # Gradients are linear: that of the gap is the gap of the gradients.
    total += _mean_per_sample(jnp.abs(gap[:, 1:] - gap[:, :-1]))
    total += _mean_per_sample(jnp.abs(gap[:, :, 1:] - gap[:, :, :-1]))
    if features:
      filters = jnp.asarray(_random_filters(a.shape[-1], features, scale))
      fa, fb = (
        nn.relu(conv2d(x, filters, 2, ((1, 1), (1, 1)))) for x in (a, b)
      )
      total += 0.5 * _mean_per_sample(jnp.abs(fa - fb))
  return total / scales


class LPIPS(nn.Module):
  """Channel-wise VGG16 distance (richzhang/PerceptualSimilarity).

  Parameters come from `load_lpips`; there is no meaningful initialisation.
  """

  impl: str = 'auto'

  @nn.compact
  def __call__(
    self, images: Float[Array, 'B H W 3'], truth: Float[Array, 'B H W 3']
  ) -> Float[Array, ' B']:
    batch = images.shape[0]
    x = jnp.concatenate([images, truth]).astype(jnp.float32)
    x = (x - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
    total = jnp.zeros(batch, jnp.float32)
    for stage, widths in enumerate(_VGG):
      if stage:
        x = nn.max_pool(x, (2, 2), (2, 2))
      for c, width in enumerate(widths):
        name = f'conv{stage + 1}_{c + 1}'
        x = nn.relu(Conv(width, impl=self.impl, name=name)(x))
      unit = x / (jnp.sqrt(_square_sum(x)) + 1e-10)
      gap = jnp.square(unit[:batch] - unit[batch:])
      weight = self.param(
        f'lin{stage}', nn.initializers.ones_init(), (widths[-1],), jnp.float32
      )
      total += jnp.mean(jnp.sum(gap * weight, axis=-1), axis=(1, 2))
    return total


def _square_sum(x: Float[Array, '... C']) -> Float[Array, '... C']:
  """Sum over channels; the floor keeps the root's gradient finite at 0."""
  return jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-20)


def load_lpips(path: str) -> dict[str, Any]:
  """Parameters of `LPIPS` from one .safetensors or .npz file.

  Args:
    path: holds VGG16 (`features.0.weight` ..., or lpips' own
      `net.slice1.0.weight` ...) and the linear layers (`lin0.model.1.weight`
      or `lins.0.model.1.weight` ...). Classifier tensors are passed over.

  Raises:
    ValueError: another file type, or tensors missing (all are listed).
  """
  suffix = pathlib.Path(path).suffix
  if suffix == '.safetensors':
    state: Mapping[str, np.ndarray] = load_file(path)
  elif suffix == '.npz':
    state = dict(np.load(path))
  else:
    raise ValueError(
      f'LPIPS weights {path!r}; accepted: .safetensors or .npz (set '
      '`loss.lpips_path`)'
    )
  params: dict[str, Any] = {}
  for name, value in state.items():
    value = np.asarray(value, np.float32)
    conv = re.fullmatch(
      r'(?:net\.slice\d|features)\.(\d+)\.(weight|bias)', name
    )
    lin = re.fullmatch(r'lins?\.?(\d)\.model\.1\.weight', name)
    if conv and int(conv[1]) in _TORCH_INDEX:
      ours = params.setdefault(_NAMES[_TORCH_INDEX.index(int(conv[1]))], {})
      if conv[2] == 'weight':
        ours['kernel'] = value.transpose(2, 3, 1, 0)
      else:
        ours['bias'] = value
    elif lin:
      params[f'lin{lin[1]}'] = value.reshape(-1)
  missing = [
    f'{name}.{leaf}'
    for name in _NAMES
    for leaf in ('kernel', 'bias')
    if leaf not in params.get(name, {})
  ] + [f'lin{i}' for i in range(len(_VGG)) if f'lin{i}' not in params]
  if missing:
    raise ValueError(f'{path}: LPIPS weights without {", ".join(missing)}')
  return params
