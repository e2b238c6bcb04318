"""Inception's features and classes of pictures, through torch-fidelity.

In: uint8 pictures of any size, and the weights (`weights-inception-2015-12-05`
as torch-fidelity publishes them), which the user gives. Out: pool features
`[n, 2048]` and class logits `[n, 1008]` for FID and IS. Called by
`suites/fid.py`. PyTorch comes with the extra `eval`. Source: method 10.1, 10.2.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from scar_jax.eval.metrics.frechet import Moments, Statistics
from scar_jax.extras import require

SIDE = 299  # pixels that the network sees
# How a picture comes to that size: inside the graph, by TensorFlow 1's
# bilinear rule (C2I tables), or by clean-fid's antialiased bicubic (T2I).
RESIZE = ('tf1', 'clean')
CLASSES = 1008
# Calls in order; pooling layers have no weights.
_LAYERS = (
  *('Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3', 'MaxPool_1'),
  *('Conv2d_3b_1x1', 'Conv2d_4a_3x3', 'MaxPool_2'),
  *('Mixed_5b', 'Mixed_5c', 'Mixed_5d'),
  *('Mixed_6a', 'Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e'),
  *('Mixed_7a', 'Mixed_7b', 'Mixed_7c', 'AvgPool'),
)


class Inception:
  """The network with given weights.

  Args:
    weights: .pth file in the layout of torch-fidelity; never downloaded.
    resize: a value of `RESIZE`.
    batch: pictures at a time.

  Raises:
    ValueError: no such file, a wrong layout, or a package is missing.
  """

  def __init__(self, weights: str, resize: str = 'tf1', batch: int = 32):
    if resize not in RESIZE:
      raise ValueError(f'resize={resize!r}; accepted: {", ".join(RESIZE)}')
    if not weights or not pathlib.Path(weights).is_file():
      raise ValueError(
        f'--inception={weights!r}: no such file; accepted: the weights that '
        'torch-fidelity publishes, weights-inception-2015-12-05-6726825d.pth'
      )
    self._torch = require('torch', 'eval')
    fidelity = require('torch_fidelity.feature_extractor_inceptionv3', 'eval')
    try:
      self._network: Any = fidelity.FeatureExtractorInceptionV3(
        'inception',
        ['2048', 'logits'],
        feature_extractor_weights_path=str(weights),
      )
    except (RuntimeError, KeyError, AttributeError) as error:
      raise ValueError(
        f'--inception={weights!r} does not fit the network: {error}'
      ) from error
    interpolate = require(
      'torch_fidelity.interpolate_compat_tensorflow', 'eval'
    )
    self._tf1 = interpolate.interpolate_bilinear_2d_like_tensorflow1x
    self._resize, self._batch = resize, batch

  def __call__(
    self, pictures: Sequence[UInt8[np.ndarray, 'H W 3']]
  ) -> tuple[Float[np.ndarray, 'n 2048'], Float[np.ndarray, 'n 1008']]:
    """Features and logits; pictures of several sizes are made one by one."""
    torch = self._torch
    sizes = {p.shape for p in pictures}
    if len(sizes) > 1:
      pairs = [self([p]) for p in pictures]
      features, logits = zip(*pairs, strict=True)
      return np.concatenate(features), np.concatenate(logits)
    with torch.inference_mode():
      x = self._sized(pictures)
      x = (x - 128) / 128
      for name in _LAYERS:
        x = getattr(self._network, name)(x)
      x = torch.flatten(x, 1)
      return x.numpy(), self._network.fc(x).numpy()

  def _sized(self, pictures: Sequence[np.ndarray]) -> Any:
    if self._resize == 'clean':
      stacked = np.stack([_bicubic(p) for p in pictures])
    else:
      stacked = np.stack(pictures).astype(np.float32)
    x = self._torch.from_numpy(stacked.transpose(0, 3, 1, 2).copy())
    if self._resize == 'clean':
      return x
    return self._tf1(x, size=(SIDE, SIDE), align_corners=False)

  def read(
    self, pictures: Iterable[UInt8[np.ndarray, 'H W 3']]
  ) -> tuple[Statistics, Float[np.ndarray, 'n 1008']]:
    """Statistics of the features, and all logits, of any number of pictures."""
    moments, logits, waiting = Moments(), [], []

    def take() -> None:
      features, some = self(waiting)
      moments.add(features)
      logits.append(some)
      waiting.clear()

    for picture in pictures:
      waiting.append(picture)
      if len(waiting) == self._batch:
        take()
    if waiting:
      take()
    return moments.statistics(), np.concatenate(logits)


def _bicubic(picture: np.ndarray) -> np.ndarray:
  """Each channel in floats, neither clipped nor rounded, as clean-fid."""
  channels = [
    Image.fromarray(picture[..., c].astype(np.float32)).resize(
      (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    for c in range(3)
  ]
  return np.stack([np.asarray(c) for c in channels], axis=-1)


def inception_score(
  logits: Float[np.ndarray, 'n 1008'], splits: int = 10
) -> tuple[float, float]:
  """Mean and deviation of IS over splits of shuffled samples.

  Raises:
    ValueError: fewer samples than splits.
  """
  if len(logits) < splits:
    raise ValueError(
      f'IS of {len(logits)} samples in {splits} splits; accepted: as many '
      'samples as splits, or more'
    )
  torch = require('torch', 'eval')
  isc = require('torch_fidelity.metric_isc', 'eval')
  # Its own seed, so that numbers are those of its command.
  found = isc.isc_features_to_metric(torch.from_numpy(logits), splits)
  mean, deviation = isc.KEY_METRIC_ISC_MEAN, isc.KEY_METRIC_ISC_STD
  return float(found[mean]), float(found[deviation])
