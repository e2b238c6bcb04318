"""DINOv2 beside ours: features of all patches.

In: a checkout of facebookresearch/dinov2. Out: a `Pair` for each work of
`reference.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.bench.torch_side import (
  Checkout,
  Pair,
  Setting,
  forward_pair,
  gap,
  in_dtype,
  no_grad,
  on_device,
  shaken,
  tensors,
  to_numpy,
  to_torch,
)
from scar_jax.convert import dinov2
from scar_jax.convert.parity_vq import nhwc
from scar_jax.models.encoders.dinov2 import DINOv2
from scar_jax.models.unstacked import as_read_fastest

_VIT = 'dinov2.models.vision_transformer'
MODULES = (_VIT,)
_PATCH, _TABLE = 14, 518  # pixels; the second is what positions are stored for
_MAKERS = {'B': 'vit_base', 'L': 'vit_large'}


def features(checkout: Checkout, size: str, setting: Setting) -> Pair:
  """Class and patch tokens after the last norm."""
  make: Any = getattr(checkout.load(_VIT), _MAKERS[size])
  model = make(
    img_size=_TABLE, patch_size=_PATCH, init_values=1.0, block_chunks=0
  )
  weights = tensors(shaken(model.eval()))
  cfg = dataclasses.replace(
    dinov2.detect(weights).network(), dtype=setting.dtype
  )
  params = on_device(dinov2.convert(cfg, weights))
  params = jax.tree.map(lambda x: x.astype(setting.dtype), params)
  variables = {'params': as_read_fastest(params, turn=True)}
  side = _PATCH * setting.grid
  rng = np.random.default_rng(0)
  images = rng.normal(size=(setting.batch, 3, side, side)).astype(np.float32)
  apply = jax.jit(DINOv2(cfg).apply)
  run: Any = functools.partial(apply, variables, jnp.asarray(nhwc(images)))
  given = to_torch(images)
  theirs = in_dtype(model.forward_features, setting)

  def differ() -> tuple[float, str]:
    out, want = run(), no_grad(theirs, given)
    pairs = ((out.cls, 'x_norm_clstoken'), (out.patches, 'x_norm_patchtokens'))
    gaps = (gap(ours, to_numpy(want[key])) for ours, key in pairs)
    return max(gaps), 'features'

  return forward_pair(run, theirs, (given,), differ, setting)
