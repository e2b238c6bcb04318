"""The frozen networks around a `Scar`, and the config that ties them to it.

In: images and text ids of a batch. Out: target tokens, `Conditions`, and images
from tokens. Pure functions of parameters passed as an argument, so training,
sampling and scoring share them. Called by `train/tasks/scar.py`, `editor.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scar_jax.filters import SamplerConfig
from scar_jax.models.conditions import Conditions
from scar_jax.models.convolutions import each_picture
from scar_jax.models.encoders.semantic import SemanticEncoder
from scar_jax.models.encoders.t5 import T5Encoder
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.tokenizers.make import is_multi_scale, make_tokenizer
from scar_jax.models.tokenizers.msvq import accumulator
from scar_jax.models.tokenizers.vq import VQConfig
from scar_jax.orders.scale import Accumulate
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
    image_size: pixels, square; of pictures without a shape of their own.
    shapes: (height, width) that it was trained in; () is the square.
    tokenizer: artifact directory, as given in training.
    encoder: the same for the semantic encoder; '' if unused.
    text_encoder: the same for a frozen T5; '' if unused.
    encoder_dtype: of the encoder's parameters and matrix products; '' as in
      its artifact.
    text_dtype: the same for a frozen T5.
    batch: images made together; smaller requests are padded to it.
  """

  model: ScarConfig
  sample: SamplerConfig = SamplerConfig()
  text: TextSetup = TextSetup()
  image_size: int = 32
  shapes: tuple[tuple[int, int], ...] = ()
  tokenizer: str = ''
  encoder: str = ''
  text_encoder: str = ''
  encoder_dtype: str = ''
  text_dtype: str = ''
  batch: int = 16

  @property
  def square(self) -> tuple[int, int]:
    """(height, width) of pictures without a shape of their own."""
    return self.image_size, self.image_size

  @property
  def needs(self) -> tuple[str, ...]:
    """Names of the frozen networks that the model runs with."""
    prefix, needs = self.model.prefix, ['tokenizer']
    if prefix.compress != 'off' and not prefix.from_tokens:
      needs.append('encoder')
    if self.model.text.kind == 't5':
      needs.append('text')
    return tuple(needs)

  def sized(self, size: tuple[int, int]) -> 'EditorConfig':
    """The same networks on pictures of another shape.

    Tokens and features stay as dense as in the square, so that both see the
    picture undistorted; no parameter depends on their number.

    Args:
      size: (height, width), pixels.

    Raises:
      ValueError: sides that do not give whole tokens, or features that the
        prefix compresses; names the step that does.
    """
    model, square = self.model, self.image_size
    if size == self.square:
      return self
    wanted = [(model.grid[0], 1), (model.prefix.grid[0], model.prefix.step)]
    if model.prefix.compress == 'off':
      wanted = wanted[:1]
    # The shortest side that is a whole number of both, in their square.
    units = [square * k // math.gcd(square * k, cells) for cells, k in wanted]
    if any(side % unit for side in size for unit in units):
      raise ValueError(
        f'a picture of {size[0]}x{size[1]} pixels (height x width) does not '
        'hold whole tokens and whole blocks of features; accepted: sides that '
        f'are multiples of {math.lcm(*units)} (set --config.data.aspect_step)'
      )

    def grid(square_grid: tuple[int, int]) -> tuple[int, int]:
      return (
        square_grid[0] * size[0] // square,
        square_grid[1] * size[1] // square,
      )

    prefix = dataclasses.replace(model.prefix, grid=grid(model.prefix.grid))
    model = dataclasses.replace(model, grid=grid(model.grid), prefix=prefix)
    return dataclasses.replace(self, model=model)

  def retyped(self, name: str, artifact: Any) -> Any:
    """The artifact of a frozen network, in the type that it is used in.

    Training and sampling both go through here: features must not differ. The
    tokenizer stays in float32, or some of its tokens would change.
    """
    dtype = {'encoder': self.encoder_dtype, 'text': self.text_dtype}.get(name)
    if not dtype:
      return artifact

    def cast(x: Any) -> Any:
      if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
      if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.dtype(dtype))
      return x.astype(dtype)

    return dataclasses.replace(
      artifact,
      config=dataclasses.replace(artifact.config, dtype=dtype),
      params=jax.tree.map(cast, artifact.params),
    )


# How guidance grows over the sets where the config does not say.
_RAMPS = {'scale': 'sets'}
# And which top-p rule its reference has.
_RULES = {'scale': 'var'}


def sampler_config(section: Any, order: str = 'raster') -> SamplerConfig:
  """Sampler settings of the config section `sample`.

  With an image scale of 1 the three-branch form equals guidance on text alone,
  so that the third branch is left out.

  Args:
    section: see `scar_jax.config.SampleConfig`.
    order: of the model, which decides what the section leaves open.
  """
  image = float(section.image_guidance)
  return SamplerConfig(
    temperature=section.temperature,
    top_k=section.top_k,
    top_p=section.top_p,
    rule=_RULES.get(order, 'llamagen'),
    guidance_mode='text' if image == 1 else 'image_text',
    guidance=float(section.guidance),
    guidance_image=image,
    ramp=section.ramp or _RAMPS.get(order, 'constant'),
    smooth=section.smooth,
    mean_code=section.mean_code,
    num_sets=section.num_sets,
    schedule=section.schedule,
    schedule_noise=section.schedule_noise,
  )


def check_tokenizer(
  order: str, tokenizer: Any, patch_nums: tuple[int, ...] = ()
) -> None:
  """Refuses a tokenizer whose tokens the order does not predict.

  Args:
    order: name of the model's order.
    tokenizer: config.
    patch_nums: the model's scales; () accepts any.

  Raises:
    ValueError: one scale where many are needed, or the other way round; other
      scales than the model's.
  """
  if (order == 'scale') != is_multi_scale(tokenizer):
    held, wanted = ('single', 'multi')[:: 1 if order == 'scale' else -1]
    raise ValueError(
      f'order.name={order!r} with a {held}-scale tokenizer; accepted: a '
      f'{wanted}-scale one (set --config.tokenizer.artifact; a tokenizer is '
      'multi-scale if it was trained with --config.model.patch_nums)'
    )
  if patch_nums and tokenizer.patch_nums != patch_nums:
    raise ValueError(
      f'the tokenizer has scales of sides {tokenizer.patch_nums}; accepted: '
      f'those of the model, {patch_nums} (name the tokenizer that it was '
      'trained with)'
    )


class Parts:
  """The frozen networks of one model, as functions of their parameters."""

  def __init__(self, cfg: EditorConfig, configs: Mapping[str, Any]):
    """Modules from configs.

    Args:
      cfg: of the model.
      configs: 'tokenizer', and where the model needs them 'encoder', 'text'.

    Raises:
      ValueError: a tokenizer of another kind, or of other scales than the
        model's.
    """
    model = cfg.model
    check_tokenizer(model.order, configs['tokenizer'], model.patch_nums)
    self.cfg, self.configs = cfg, dict(configs)
    self.tokenizer: Any = make_tokenizer(configs['tokenizer'])
    self.encoder: Any = None
    self.text: Any = None
    if 'encoder' in configs:
      self.encoder = SemanticEncoder(configs['encoder'])
    if 'text' in configs:
      self.text = T5Encoder(configs['text'])

  def tokens(
    self, frozen: Mapping[str, PyTree], images: Float[Array, 'B H W 3']
  ) -> Int[Array, 'B *n']:
    """Token grid of images; the tokens of all scales in the scale order."""
    encode = self._bound(frozen, 'encode')
    pixels = math.prod(images.shape[1:3])
    return each_picture(lambda x: encode(x)[0], images, pixels)

  def noisy_tokens(
    self,
    frozen: Mapping[str, PyTree],
    images: Float[Array, 'B H W 3'],
    rng: Array,
  ) -> tuple[Int[Array, 'B N'], Int[Array, 'B N']]:
    """Scale order: tokens to predict, and noisy ones to predict them from."""
    encode = self._bound(frozen, 'encode_noisy')
    return encode(images, self.cfg.model.token_noise, rngs={'noise': rng})

  def accumulate(self, frozen: Mapping[str, PyTree]) -> Accumulate:
    """What sampling asks of the tokenizer, as a pytree; see `Loop`."""
    if self.cfg.model.order != 'scale':
      return _code_lookup(self.tokenizer.cfg, frozen['tokenizer'])
    return accumulator(self.tokenizer.cfg, frozen['tokenizer'])

  def codes(self, frozen: Mapping[str, PyTree]) -> Float[Array, 'V C']:
    """The tokenizer's codes, as its decoder reads them."""
    return self._bound(frozen, 'table')()

  def _bound(self, frozen: Mapping[str, PyTree], method: str) -> Any:
    params = {'params': frozen['tokenizer']}
    return functools.partial(self.tokenizer.apply, params, method=method)

  def images(
    self,
    frozen: Mapping[str, PyTree],
    tokens: Int[Array, 'B N'],
    latent: Float[Array, 'B h w C'] | None = None,
  ) -> Float[Array, 'B H W 3']:
    """Images of tokens, unclamped.

    Args:
      frozen: parameters.
      tokens: row-major; of all scales in the scale order.
      latent: the sampler's mixture of codes, decoded in place of the tokens.
    """
    grid = self.cfg.model.grid
    pixels = math.prod(grid) * self.tokenizer.cfg.downsample**2
    if latent is not None:
      return each_picture(self._bound(frozen, 'decode'), latent, pixels)
    if self.cfg.model.order != 'scale':
      tokens = tokens.reshape(-1, *grid)
    return each_picture(self._bound(frozen, 'decode_tokens'), tokens, pixels)

  def conditions(
    self,
    frozen: Mapping[str, PyTree],
    batch: Batch,
    align: bool = False,
  ) -> tuple[Conditions, Float[Array, 'B h w d'] | None]:
    """Conditions of a batch, and with `align` the features of its targets.

    What the batch brings from a cache is not computed again.

    Raises:
      ValueError: the batch lacks a field that the model needs.
    """
    model, fields, features = self.cfg.model, {}, None
    if model.prefix.from_tokens:
      fields['source_tokens'] = (
        batch['source_tokens']
        if 'source_tokens' in batch
        else self.tokens(frozen, _field(batch, 'condition'))
      )
    elif model.prefix.compress != 'off':
      fields['features'], features = self._features(frozen, batch, align)
    if model.text.kind == 'label':
      fields['label'] = _field(batch, 'label')
    elif model.text.kind != 'none':
      mask = _field(batch, 'text_mask')
      fields |= {'text': self._text(frozen, batch, mask), 'text_mask': mask}
    return Conditions(**fields), features

  def _features(
    self, frozen: Mapping[str, PyTree], batch: Batch, align: bool
  ) -> tuple[Array, Array | None]:
    """Features of the condition image, and of the target if asked."""
    if 'features' in batch:
      # Stored in fewer bits perhaps; the model gets what the encoder gives.
      names = ('features', 'target_features')[: 1 + align]
      found = [_field(batch, name).astype(jnp.float32) for name in names]
      return found[0], found[1] if align else None
    images = _field(batch, 'condition')
    shape = images.shape
    if align:
      # One pass for both. Side by side, or a sharded batch would change places.
      images = jnp.stack([images, _field(batch, 'target')], axis=1)
      images = images.reshape(-1, *shape[1:])
    params = {'params': frozen['encoder']}
    grid = self.cfg.model.prefix.grid
    if grid[0] == grid[1]:
      grid = None  # the encoder's own; one of another size would be told
    both = jax.lax.stop_gradient(self.encoder.apply(params, images, grid))
    if not align:
      return both, None
    both = both.reshape(shape[0], 2, *both.shape[1:])
    return both[:, 0], both[:, 1]

  def _text(
    self, frozen: Mapping[str, PyTree], batch: Batch, mask: Array
  ) -> Array:
    """Ids, or the features of a frozen T5."""
    if self.cfg.model.text.kind != 't5':
      return _field(batch, 'text')
    if 'text_features' in batch:
      return jnp.asarray(batch['text_features']).astype(jnp.float32)
    # An empty row has no key to attend to; its features are not used.
    seen = mask.at[:, 0].set(True)
    return jax.lax.stop_gradient(
      self.text.apply({'params': frozen['text']}, _field(batch, 'text'), seen)
    )


def parts_by_shape(
  cfg: EditorConfig, configs: Mapping[str, Any]
) -> dict[tuple[int, int], Parts]:
  """(height, width) -> the networks for such pictures; the square is there.

  Raises:
    ValueError: see `EditorConfig.sized` and `Parts`.
  """
  shapes = dict.fromkeys((cfg.square, *cfg.shapes))
  return {shape: Parts(cfg.sized(shape), configs) for shape in shapes}


def _field(batch: Batch, name: str) -> Array:
  if name not in batch:
    raise ValueError(
      f'the batch has no field {name!r}; given: {", ".join(sorted(batch))} '
      '(choose a source that has it, or set prefix.compress=off or '
      'text.kind=none)'
    )
  return jnp.asarray(batch[name])


def to_uint8(images: Float[Array, 'B H W 3']) -> Array:
  """[-1, 1], clamped, to 0 ... 255."""
  return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def _code_lookup(cfg: VQConfig, params: PyTree) -> Accumulate:
  """For orders of tokens: codes of ids, or means of weights; keeps no sum."""
  return jax.tree_util.Partial(_codes_of(cfg), {'params': params})


@functools.lru_cache(maxsize=8)
def _codes_of(cfg: VQConfig) -> Callable[..., Any]:
  # One function for each config: compiled programs tell them apart.
  model = make_tokenizer(cfg)

  def call(params: PyTree, k: int, latent: None, chosen: Array) -> Any:
    del k, latent
    return model.apply(params, chosen, method='lookup'), None

  return call
