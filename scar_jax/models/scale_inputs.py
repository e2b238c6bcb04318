"""What VAR adds around the decoder: its input tables, all in float32.

In: class ids, `Inputs` of the scale order, embeddings of prefix and text. Out:
the condition vector of the AdaLN blocks, embeddings of target positions, of
prefix and text. Places and scales are learned; a rotary embedding is optional.
Called by `models/scar.py`. Source: FoundationVision/VAR (method 4.2, 4.4),
method 4.5 for prefix and text.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models import layers as nl
from scar_jax.models.blocks import ada_std
from scar_jax.models.dense import Dense
from scar_jax.orders.layout import START, Inputs, grid_positions
from scar_jax.orders.scale import ScaleOrder
from scar_jax.sharding import annotated


class ScaleInputs(nn.Module):
  """Tables of classes, start tokens, places and scales; latents' projection.

  Attributes:
    order: the scales.
    width: D.
    classes: of the class table; id `classes` is the null class, the only one
      of a model without classes.
    prefix_grid: (rows, columns) of the prefix, None without one.
    text_len: T, 0 without a text.
    places: 'normal', or 'sincos' or 'rotary', see `ScarConfig`.
  """

  order: ScaleOrder
  width: int
  classes: int
  prefix_grid: tuple[int, int] | None = None
  text_len: int = 0
  places: str = 'normal'

  def setup(self):
    order, std = self.order, ada_std(self.width)
    init = nn.initializers.normal(std)

    def table(name: str, rows: int, init: Any = init) -> Any:
      shape = (rows, self.width)
      return self.param(name, annotated(init, None, 'table'), shape)

    def place_init(centres: Float[Array, 'n 2'] | np.ndarray) -> Any:
      if self.places == 'normal':
        return init
      waves = nl.place_waves(centres / order.patch_nums[-1], self.width)
      return lambda *_: jnp.asarray(std * waves)

    self.label = table('label', self.classes + 1)
    self.start = table('start', order.set_sizes[0])
    centres = order.positions() + 0.5
    self.place = table('place', order.num_targets, place_init(centres))
    self.level = table('level', len(order.set_sizes))
    self.word = Dense(
      (self.width,), (None, 'embed'), use_bias=True, kernel_init=init
    )
    if self.prefix_grid:
      cells = grid_positions(self.prefix_grid) + 0.5
      cells *= np.divide(order.side, self.prefix_grid)
      self.prefix_place = table('prefix_place', len(cells), place_init(cells))
      self.prefix_level = table('prefix_level', 1)
    if self.text_len:
      self.text_place = table('text_place', self.text_len)
      self.text_level = table('text_level', 1)
      # Zero: a new model starts from the null class, which VAR has learned.
      self.pooled = Dense(
        (self.width,), ('embed', 'mlp'), kernel_init=nn.initializers.zeros
      )

  def condition(
    self,
    null: Bool[Array, ' B'],
    label: Int[Array, ' B'] | None = None,
    text: Float[Array, 'B T D'] | None = None,
    mask: Bool[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B D']:
    """The class embedding; without classes the null class, and pooled text.

    Args:
      null: rows that get the null class, and whose text is the null text.
      label: class ids.
      text: embeddings of the text.
      mask: True at its words; an all-False row is the null text.
    """
    if label is not None:
      return jnp.asarray(self.label)[jnp.where(null, self.classes, label)]
    vector = jnp.broadcast_to(self.label[-1], (len(null), self.width))
    if text is None or mask is None:
      return vector
    # A null text has no words, and a row must not keep those it had.
    null = null | ~jnp.any(mask, axis=-1)
    words = (mask | null[:, None])[..., None].astype(jnp.float32)
    mean = jnp.sum(text * words, axis=1) / jnp.sum(words, axis=1)
    return vector + self.pooled(mean)

  def prefix(self, x: Float[Array, 'B P D']) -> Float[Array, 'B P D']:
    """Prefix embeddings with their places and a level of their own."""
    return x + self.prefix_place + self.prefix_level

  def text(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    """Text embeddings with their places and a level of their own."""
    return x + self.text_place + self.text_level

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
