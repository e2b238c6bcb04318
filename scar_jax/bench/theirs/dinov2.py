"""DINOv2: features of all patches.

In: a checkout of facebookresearch/dinov2. Out: a `Made`.
"""

from typing import Any

import numpy as np

from scar_jax.bench.theirs.common import (
  Checkout,
  Made,
  Setting,
  forward,
  in_dtype,
  shaken,
  tensors,
  to_numpy,
  to_torch,
)

_VIT = 'dinov2.models.vision_transformer'
MODULES = (_VIT,)
_PATCH, _TABLE = 14, 518  # pixels; the second is what positions are stored for
_MAKERS = {'B': 'vit_base', 'L': 'vit_large'}


def features(checkout: Checkout, size: str, setting: Setting) -> Made:
  """Class and patch tokens after the last norm."""
  make: Any = getattr(checkout.load(_VIT), _MAKERS[size])
  model = make(
    img_size=_TABLE, patch_size=_PATCH, init_values=1.0, block_chunks=0
  )
  model = shaken(model.eval())
  side = _PATCH * setting.grid
  rng = np.random.default_rng(0)
  images = rng.normal(size=(setting.batch, 3, side, side)).astype(np.float32)
  call = in_dtype(model.forward_features, setting)
  parts: Any = forward(call, (to_torch(images),), setting)

  def outputs() -> dict[str, np.ndarray]:
    made = parts['call']()
    names = {'cls': 'x_norm_clstoken', 'patches': 'x_norm_patchtokens'}
    return {ours: to_numpy(made[name]) for ours, name in names.items()}

  weights, inputs = {'vit': tensors(model)}, {'images': images}
  return Made(weights, inputs, **parts, outputs=outputs)
