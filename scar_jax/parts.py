"""The frozen networks around a `Scar`, and the config that ties them to it.

In: images and text ids of a batch. Out: target tokens, `Conditions`, and images
from tokens. Pure functions of parameters passed as an argument, so training,
sampling and scoring share them. Called by `train/tasks/scar.py`, `editor.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scar_jax.filters import SamplerConfig
from scar_jax.models.encoders.semantic import SemanticEncoder
from scar_jax.models.encoders.t5 import T5Encoder
from scar_jax.models.scar import Conditions
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.tokenizers.vq import VQModel
from scar_jax.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class TextSetup:
  """How a prompt becomes ids; the fields of `data.text.make_text`."""

  kind: str = 'byte'
  length: int = 40
  vocab: str = ''
  pad: str = 'right'


@dataclasses.dataclass(frozen=True)
class EditorConfig:
  """All that `Editor.load` needs besides parameters.

  Attributes:
    model: the trained model.
    sample: default sampler settings.
    text: how prompts are tokenized.
    image_size: pixels, square.
    tokenizer: artifact directory, as given in training.
    encoder: the same for the semantic encoder; '' if unused.
    text_encoder: the same for a frozen T5; '' if unused.
    batch: images made together; smaller requests are padded to it.
  """

  model: ScarConfig
  sample: SamplerConfig = SamplerConfig()
  text: TextSetup = TextSetup()
  image_size: int = 32
  tokenizer: str = ''
  encoder: str = ''
  text_encoder: str = ''
  batch: int = 16

  @property
  def needs(self) -> tuple[str, ...]:
    """Names of the frozen networks that the model runs with."""
    prefix, needs = self.model.prefix, ['tokenizer']
    if prefix.compress != 'off' and not prefix.from_tokens:
      needs.append('encoder')
    if self.model.text.kind == 't5':
      needs.append('text')
    return tuple(needs)


def sampler_config(section: Any) -> SamplerConfig:
  """Sampler settings of the config section `sample`.

  With an image scale of 1 the three-branch form equals guidance on text alone,
  so that the third branch is left out.
  """
  image = float(section.image_guidance)
  return SamplerConfig(
    temperature=section.temperature,
    top_k=section.top_k,
    top_p=section.top_p,
    guidance_mode='text' if image == 1 else 'image_text',
    guidance=float(section.guidance),
    guidance_image=image,
    num_sets=section.num_sets,
    schedule=section.schedule,
    schedule_noise=section.schedule_noise,
  )


class Parts:
  """The frozen networks of one model, as functions of their parameters."""

  def __init__(self, cfg: EditorConfig, configs: Mapping[str, Any]):
    """Modules from configs.

    Args:
      cfg: of the model.
      configs: 'tokenizer', and where the model needs them 'encoder', 'text'.
    """
    self.cfg = cfg
    self.tokenizer: Any = VQModel(configs['tokenizer'])
    self.encoder: Any = None
    self.text: Any = None
    if 'encoder' in configs:
      self.encoder = SemanticEncoder(configs['encoder'])
    if 'text' in configs:
      self.text = T5Encoder(configs['text'])

  def tokens(
    self, frozen: Mapping[str, PyTree], images: Float[Array, 'B H W 3']
  ) -> Int[Array, 'B h w']:
    """Token grid of images."""
    params = {'params': frozen['tokenizer']}
    return self.tokenizer.apply(params, images, method='encode')[0]

  def codes(self, frozen: Mapping[str, PyTree]) -> Float[Array, 'V C']:
    """The tokenizer's codes, as its decoder reads them."""
    params = {'params': frozen['tokenizer']}
    return self.tokenizer.apply(params, method='table')

  def images(
    self, frozen: Mapping[str, PyTree], tokens: Int[Array, 'B N']
  ) -> Float[Array, 'B H W 3']:
    """Images of row-major tokens, unclamped."""
    grid = tokens.reshape(tokens.shape[0], *self.cfg.model.grid)
    params = {'params': frozen['tokenizer']}
    return self.tokenizer.apply(params, grid, method='decode_tokens')

  def conditions(
    self,
    frozen: Mapping[str, PyTree],
    batch: Batch,
    target: Float[Array, 'B H W 3'] | None = None,
  ) -> tuple[Conditions, Float[Array, 'B h w d'] | None]:
    """Conditions of a batch, and the features of `target` if that is given.

    Raises:
      ValueError: the batch lacks a field that the model needs.
    """
    model, fields, features = self.cfg.model, {}, None
    if model.prefix.from_tokens:
      condition = _field(batch, 'condition')
      fields['source_tokens'] = self.tokens(frozen, condition)
    elif model.prefix.compress != 'off':
      images = _field(batch, 'condition')
      count = images.shape[0]
      if target is not None:  # one pass for both
        images = jnp.concatenate([images, target])
      params = {'params': frozen['encoder']}
      both = jax.lax.stop_gradient(self.encoder.apply(params, images))
      fields['features'] = both[:count]
      features = None if target is None else both[count:]
    if model.text.kind == 'label':
      fields['label'] = _field(batch, 'label')
    elif model.text.kind != 'none':
      text, mask = _field(batch, 'text'), _field(batch, 'text_mask')
      if model.text.kind == 't5':
        # An empty row has no key to attend to; its features are not used.
        seen = mask.at[:, 0].set(True)
        text = jax.lax.stop_gradient(
          self.text.apply({'params': frozen['text']}, text, seen)
        )
      fields |= {'text': text, 'text_mask': mask}
    return Conditions(**fields), features


def _field(batch: Batch, name: str) -> Array:
  if name not in batch:
    raise ValueError(
      f'the batch has no field {name!r}; given: {", ".join(sorted(batch))} '
      '(choose a source that has it, or set prefix.compress=off or '
      'text.kind=none)'
    )
  return jnp.asarray(batch[name])
