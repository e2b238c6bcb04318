"""LPIPS by SqueezeNet, AlexNet or VGG, through the package `lpips`.

In: pictures in [-1, 1] or uint8, and the ImageNet weights of the network, which
the user gives (its linear layers come with the package). Out: a distance.
Called by `pie.py`. PyTorch comes with the extra `eval`. Source:
richzhang/PerceptualSimilarity; `models/tokenizers/perceptual.py` is the VGG
form as a training loss.
"""

import pathlib
import re
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from scar_jax.extras import require

NETWORKS = ('squeeze', 'alex', 'vgg')


class Lpips:
  """The distance by one network.

  Args:
    weights: .pth or .safetensors of torchvision, such as
      squeezenet1_1-b8a52dc0.pth; never downloaded.
    network: a value of `NETWORKS`; PIE-Bench takes 'squeeze'.

  Raises:
    ValueError: no such file, tensors of another network, a missing package.
  """

  def __init__(self, weights: str, network: str = 'squeeze'):
    if network not in NETWORKS:
      raise ValueError(f'LPIPS {network!r}; accepted: {", ".join(NETWORKS)}')
    if not weights or not pathlib.Path(weights).is_file():
      raise ValueError(
        f'--lpips={weights!r}: no such file; accepted: the ImageNet weights of '
        f'{network} that torchvision publishes'
      )
    self._torch = require('torch', 'eval')
    package = require('lpips', 'eval')
    # `pnet_rand` keeps the package from downloading the same weights.
    self._network: Any = package.LPIPS(
      net=network, pnet_rand=True, verbose=False
    )
    self._fill(weights)
    self._network.requires_grad_(False)

  def _fill(self, weights: str) -> None:
    if weights.endswith('.safetensors'):
      from safetensors.torch import load_file

      state = load_file(weights)
    else:
      state = self._torch.load(weights, map_location='cpu', weights_only=True)
    own = self._network.net.state_dict()
    # The package cuts `features` into slices and keeps the numbers in them.
    found = {}
    for name in own:
      place = re.sub(r'^slice\d+\.', 'features.', name)
      if place in state and state[place].shape == own[name].shape:
        found[name] = state[place]
    missing = sorted(set(own) - set(found))
    if missing:
      raise ValueError(
        f'--lpips={weights!r} lacks {len(missing)} of {len(own)} tensors of '
        f'the network, such as {missing[0]}; accepted: the file of torchvision'
      )
    self._network.net.load_state_dict(found)

  def __call__(
    self,
    a: UInt8[np.ndarray, 'H W 3'] | Float[np.ndarray, 'H W 3'],
    b: UInt8[np.ndarray, 'H W 3'] | Float[np.ndarray, 'H W 3'],
  ) -> float:
    """Distance of two pictures, uint8 or floats in [-1, 1]."""
    tensors = []
    for x in (a, b):
      x = x / 127.5 - 1 if x.dtype == np.uint8 else x
      x = np.ascontiguousarray(x.transpose(2, 0, 1)[None], np.float32)
      tensors.append(self._torch.from_numpy(x))
    with self._torch.inference_mode():
      return float(self._network(*tensors))
