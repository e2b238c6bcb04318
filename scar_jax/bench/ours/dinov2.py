"""DINOv2 of ours: features of all patches."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.bench.ours.common import Ours, gap, on_device
from scar_jax.bench.theirs.common import Given, Setting
from scar_jax.convert import dinov2
from scar_jax.convert.parity_vq import nhwc
from scar_jax.models.encoders.dinov2 import DINOv2
from scar_jax.models.unstacked import as_read_fastest


def features(given: Given, setting: Setting) -> Ours:
  """Class and patch tokens after the last norm."""
  weights = given.weights['vit']
  cfg = dataclasses.replace(
    dinov2.detect(weights).network(), dtype=setting.dtype
  )
  params = on_device(dinov2.convert(cfg, weights))
  params = jax.tree.map(lambda x: x.astype(setting.dtype), params)
  variables = {'params': as_read_fastest(params, turn=True)}
  apply = jax.jit(DINOv2(cfg).apply)
  images = jnp.asarray(nhwc(given.inputs['images']))
  run: Any = functools.partial(apply, variables, images)

  def differ(theirs: Mapping[str, np.ndarray]) -> tuple[float, str]:
    out = run()
    gaps = gap(out.cls, theirs['cls']), gap(out.patches, theirs['patches'])
    return max(gaps), 'features'

  return Ours(run, differ)
