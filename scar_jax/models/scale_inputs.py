"""What VAR adds around the decoder: its input tables, all in float32.

In: class ids, `Inputs` of the scale order, prefix embeddings. Out: the
condition vector of the AdaLN blocks, embeddings of target positions and of the
prefix. There is no rotary embedding: places and scales are learned. Called by
`models/scar.py`. Source: FoundationVision/VAR (method 4.2, 4.4), method 4.5 for
the prefix.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models import layers as nl
from scar_jax.models.blocks import ada_std
from scar_jax.orders.layout import START, Inputs
from scar_jax.orders.scale import ScaleOrder
from scar_jax.sharding import annotated


class ScaleInputs(nn.Module):
  """Tables of classes, start tokens, places and scales; latents' projection.

  Attributes:
    order: the scales.
    width: D.
    classes: of the class table; id `classes` is the null class.
    prefix_len: P, 0 without a prefix.
  """

  order: ScaleOrder
  width: int
  classes: int
  prefix_len: int = 0

  def setup(self):
    order, init = self.order, nn.initializers.normal(ada_std(self.width))

    def table(name: str, rows: int) -> Any:
      shape = (rows, self.width)
      return self.param(name, annotated(init, None, 'embed'), shape)

    self.label = table('label', self.classes + 1)
    self.start = table('start', order.set_sizes[0])
    self.place = table('place', order.num_targets)
    self.level = table('level', len(order.set_sizes))
    self.word = nl.Dense(
      (self.width,), (None, 'embed'), use_bias=True, kernel_init=init
    )
    if self.prefix_len:
      self.prefix_place = table('prefix_place', self.prefix_len)
      self.prefix_level = table('prefix_level', 1)

  def condition(
    self, label: Int[Array, ' B'], null: Bool[Array, ' B']
  ) -> Float[Array, 'B D']:
    """The class embedding; `null` rows get the null class."""
    return jnp.asarray(self.label)[jnp.where(null, self.classes, label)]

  def prefix(self, x: Float[Array, 'B P D']) -> Float[Array, 'B P D']:
    """Prefix embeddings with their places and a level of their own."""
    return x + self.prefix_place + self.prefix_level

  def __call__(
    self, inputs: Inputs, cond: Float[Array, 'B D']
  ) -> Float[Array, 'B M D']:
    """Embeddings of target positions.

    Args:
      inputs: of the scale order.
      cond: the condition vector, which start tokens hold.
    """
    is_start = np.asarray(inputs.kind) == START
    level = jnp.asarray(self.level)[np.asarray(inputs.level)]
    index = jnp.asarray(inputs.index)
    x = jnp.asarray(self.start)[jnp.minimum(index, len(self.start) - 1)]
    x = cond[:, None] + x
    if inputs.values is not None:
      word = self.word(inputs.values.astype(jnp.float32))
      x = jnp.where(is_start[:, None], x, word)
    return x + level + jnp.asarray(self.place)[index]
