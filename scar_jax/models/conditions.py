"""What a sample is made from, and which of it a training step drops.

In: arrays of the data pipeline or of `parts.py`. Out: `Conditions`, which the
model, the sampler and the task pass around. Source of the joint dropout:
EditAR's, as in JoonHyung-Park/GridAR.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models.scar_config import ScarConfig


@struct.dataclass
class Conditions:
  """What a sample is made from. Fields that the config does not use are None.

  Attributes:
    features: frozen encoder features of the condition image.
    source_tokens: its token grid instead, for the vq prefixes.
    text: token ids ('byte') or T5 features ('t5').
    text_mask: True at real tokens; an all-False row is the null text.
    label: class ids.
    null_text: rows whose text or class becomes the null one.
    null_prefix: rows whose prefix becomes the null one.
  """

  features: Float[Array, 'B h w d'] | None = None
  source_tokens: Int[Array, 'B h w'] | None = None
  text: Int[Array, 'B T'] | Float[Array, 'B T F'] | None = None
  text_mask: Bool[Array, 'B T'] | None = None
  label: Int[Array, ' B'] | None = None
  null_text: Bool[Array, ' B'] | None = None
  null_prefix: Bool[Array, ' B'] | None = None


def empty_conditions(cfg: ScarConfig, batch: int) -> Conditions:
  """Zeros of the right shapes, for initialisation."""
  fields: dict[str, jax.Array] = {}
  prefix, text = cfg.prefix, cfg.text
  if prefix.from_tokens:
    fields['source_tokens'] = jnp.zeros((batch, *prefix.grid), jnp.int32)
  elif prefix.compress != 'off':
    fields['features'] = jnp.zeros((batch, *prefix.grid, prefix.width))
  if text.kind == 'label':
    fields['label'] = jnp.zeros(batch, jnp.int32)
  elif text.kind != 'none':
    shape = (batch, text.length)
    fields['text_mask'] = jnp.ones(shape, bool)
    fields['text'] = (
      jnp.zeros(shape, jnp.int32)
      if text.kind == 'byte'
      else jnp.zeros((*shape, text.width))
    )
  return Conditions(**fields)


def given(cond: Conditions, name: str) -> jax.Array:
  """A condition that the model needs.

  Raises:
    ValueError: it is None.
  """
  value = getattr(cond, name)
  if value is None:
    raise ValueError(
      f'the model needs conditions.{name} and got None; accepted: an array '
      '(see the data source, or set prefix.compress and text.kind to match)'
    )
  return value


def drop_conditions(
  draws: Float[Array, ' B'], scheme: str, text: float, prefix: float
) -> tuple[Bool[Array, ' B'], Bool[Array, ' B']]:
  """Which samples lose their text and which their prefix.

  Args:
    draws: uniform numbers in [0, 1), one per sample.
    scheme: 'text' drops only text, where the draw is below its rate; 'joint'
      drops the prefix below `prefix`, the text in the two outer halves of
      `text`, so that half of the text drops fall on dropped prefixes (equal
      rates).
    text: rate of null text.
    prefix: rate of null prefixes, for 'joint'.

  Returns:
    `(null_text, null_prefix)`.
  """
  if scheme == 'joint':
    outer = (draws < text / 2) | (draws > 1 - text / 2)
    return outer, draws < prefix
  return draws < text, jnp.zeros(draws.shape, bool)


def dropped(
  cond: Conditions, draws: Float[Array, ' B'], cfg: ScarConfig
) -> Conditions:
  """The conditions with those of `drop_conditions` marked as null."""
  text, prefix = drop_conditions(
    draws, cfg.cond_dropout, cfg.text_dropout, cfg.prefix_dropout
  )
  if cond.null_text is not None:
    text = text | cond.null_text
  if cfg.cond_dropout == 'text':
    return cond.replace(null_text=text)
  if cond.null_prefix is not None:
    prefix = prefix | cond.null_prefix
  return cond.replace(null_text=text, null_prefix=prefix)
