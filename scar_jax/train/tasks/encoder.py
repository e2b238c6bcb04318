"""Task 'encoder': the small semantic encoder, trained from the data itself.

In: batches with `target`, `condition` if wanted, `label_<name>` for heads. Out:
one loss of three parts: pixels of hidden patches (what a picture means), pixels
of visible ones (features keep colour and shape), labels (what it shows); and
the encoder alone as artifact. Only the encoder survives the stage.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from scar_jax.config_values import choice, number
from scar_jax.models.encoders import blocks, semantic
from scar_jax.models.encoders.dinov2 import DINOV2_SIZES, DINOv2
from scar_jax.models.encoders.semantic import EncoderConfig, encoder_config
from scar_jax.sharding import annotated
from scar_jax.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class EncoderModel:
  """Section `model`; 0 and '' mean: by size."""

  size: str = 'tiny'  # 'tiny' or a DINOv2 size: S, B, L, g, also with _reg
  image_size: int = number(0, 0)  # pixels it sees; 0: those of the data
  patch: int = number(0, 0)  # pixels
  width: int = number(0, 0)
  depth: int = number(0, 0)
  heads: int = number(0, 0)
  layerscale: str = choice('', '', 'on', 'off')
  normalize: str = choice('', '', *semantic.NORMALIZE)
  features: str = 'last'  # what the artifact gives, see EncoderConfig
  dtype: str = 'float32'


@dataclasses.dataclass(frozen=True)
class EncoderLoss:
  """Section `loss`: weights, and what the encoder is asked for."""

  visible: float = number(1.0, 0.0)  # pixels of the patches it sees
  masked: float = number(0.5, 0.0)  # pixels of the patches it does not see
  label: float = number(0.1, 0.0)  # cross entropy, mean of the heads
  mask_max: float = number(0.6, 0.0, 1.0)  # hidden share is uniform up to it
  decoder: int = number(0, 0)  # hidden width of the pixel decoder; 0: linear
  labels: tuple[tuple[str, int], ...] = ()  # heads: name, number of classes
  conditions: bool = False  # train on `condition` pictures too


SECTIONS: dict[str, type] = {'model': EncoderModel, 'loss': EncoderLoss}


def model_config(model: EncoderModel, image_size: int) -> EncoderConfig:
  """The `EncoderConfig` that the section describes; size of the data.

  Raises:
    ValueError: a size of a network that only converted checkpoints fill.
  """
  given = dataclasses.asdict(model)
  size, scale = given.pop('size'), given.pop('layerscale')
  if encoder_config(size).kind != 'dinov2':
    raise ValueError(
      f'encoder size {size!r} cannot be trained here; accepted: tiny, '
      f'{", ".join(DINOV2_SIZES)} (set --config.model.size)'
    )
  image_size = given.pop('image_size') or image_size
  values = {k: v for k, v in given.items() if v}
  if scale:
    values['layerscale'] = scale == 'on'
  patch = model.patch or encoder_config(size).patch
  if image_size % patch == 0:
    values['table'] = image_size // patch
  return encoder_config(size, image_size=image_size, **values)


def make_task(config: Any, artifacts: Mapping[str, Any]) -> 'EncoderTask':
  """The task of a checked `Config`; needs no artifacts.

  Raises:
    ValueError: unknown size, or an image size that is no multiple of the patch.
  """
  del artifacts
  cfg = model_config(config.model, config.data.image_size)
  return EncoderTask(cfg, config.loss)


class Pretrainer(nn.Module):
  """Encoder, mask token, pixel decoder and label heads."""

  cfg: EncoderConfig
  weights: EncoderLoss

  @nn.compact
  def __call__(
    self,
    images: Float[Array, 'B H W 3'],
    hidden: Bool[Array, 'B N'] | None = None,
  ) -> tuple[Float[Array, 'B N D'], Float[Array, 'B N X'], dict[str, Array]]:
    """Features, pixels of each patch, and logits of each head."""
    cfg, w = self.cfg, self.weights
    token = self.param('mask_token', annotated(blocks.INIT, None), (cfg.width,))
    encoder = DINOv2(cfg.network(), name='network')
    x = encoder(semantic.prepare(cfg, images), hidden, token).patches
    y = x
    if w.decoder:
      y = blocks.linear((w.decoder,), ('embed', 'mlp'), name='decoder_in')(y)
      y = blocks.gelu_tanh(y)
    pixels = blocks.linear(
      (3 * cfg.patch**2,), ('mlp', None), name='decoder_out'
    )(y)
    pooled = jnp.mean(x, axis=1)
    logits = {
      name: blocks.linear((n,), ('embed', None), name=f'head_{name}')(pooled)
      for name, n in w.labels
    }
    return x, pixels, logits


def patches(
  images: Float[Array, 'B H W 3'], patch: int
) -> Float[Array, 'B N X']:
  """Pixels of each patch, row-major, as one vector."""
  B, H, W, C = images.shape
  h, w = blocks.patch_grid((H, W), patch)
  x = images.reshape(B, h, patch, w, patch, C).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(B, h * w, -1)


def from_patches(
  x: Float[Array, 'B N X'], size: int, patch: int
) -> Float[Array, 'B H W 3']:
  """The inverse of `patches` for a square image."""
  n = size // patch
  x = x.reshape(-1, n, n, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(-1, size, size, 3)


def head_loss(
  logits: Float[Array, 'B C'], label: Int[Array, ' B'], valid: Bool[Array, ' B']
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Cross entropy and accuracy over rows whose label is known (0 to C - 1)."""
  known = valid & (label >= 0) & (label < logits.shape[-1])
  safe = jnp.where(known, label, 0)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
  right = (jnp.argmax(logits, -1) == safe).astype(jnp.float32)
  count = jnp.maximum(jnp.sum(known), 1)
  return jnp.sum(losses * known) / count, jnp.sum(right * known) / count


class EncoderTask:
  """See `scar_jax.train.tasks.Task`.

  Attributes:
    cfg: of the exported encoder.
    weights: the loss section.
    frozen: empty.
  """

  name = 'encoder'

  def __init__(self, cfg: EncoderConfig, weights: EncoderLoss):
    if not 0 <= weights.mask_max < 1:
      raise ValueError(
        f'loss.mask_max={weights.mask_max} hides everything; accepted: 0 to '
        'below 1 (set --config.loss.mask_max)'
      )
    self.cfg = cfg
    self.weights = weights
    self.model = Pretrainer(cfg, weights)
    self.frozen: dict[str, PyTree] = {}

  def init(self, rng: Array, batch: Batch) -> dict[str, PyTree]:
    """Variables: 'params' alone."""
    images = batch['target'][:1].astype(jnp.float32)
    return {'params': self.model.init(rng, images)['params']}

  def _inputs(self, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
    """Pictures, which rows count, and labels (-1: unknown).

    Raises:
      ValueError: the batch lacks a label that has a head.
    """
    images = batch['target']
    valid = batch.get('valid', jnp.ones(images.shape[0], bool))
    labels = {}
    for name, _ in self.weights.labels:
      if f'label_{name}' not in batch:
        raise ValueError(
          f'loss.labels asks for label_{name}; the batch has '
          f'{", ".join(sorted(batch))} (set --config.loss.labels)'
        )
      labels[name] = batch[f'label_{name}']
    if self.weights.conditions and 'condition' in batch:
      # Labels tell of the target; its source may have another tone.
      images = jnp.concatenate([images, batch['condition']])
      valid = jnp.concatenate([valid, valid])
      labels = {
        k: jnp.concatenate([v, jnp.full_like(v, -1)]) for k, v in labels.items()
      }
    return images.astype(jnp.float32), valid, labels

  def loss(
    self,
    params: PyTree,
    extra: PyTree,
    frozen: Mapping[str, PyTree],
    batch: Batch,
    rng: Array,
    train: bool,
  ) -> tuple[Float[Array, ''], tuple[dict[str, Float[Array, '']], PyTree]]:
    """See the protocol. Evaluation hides patches too, by the given key."""
    del frozen, train
    w, cfg = self.weights, self.cfg
    images, valid, labels = self._inputs(batch)
    truth = patches(semantic.prepare(_plain(cfg), images), cfg.patch)
    share_rng, place_rng = jax.random.split(rng)
    rows, count = truth.shape[:2]
    # Few or no hidden patches are common, as the frozen encoder hides none.
    share = jax.random.uniform(share_rng, (rows, 1), maxval=w.mask_max)
    hidden = jax.random.uniform(place_rng, (rows, count)) < share
    features, pixels, logits = self.model.apply(
      {'params': params}, images, hidden
    )
    error = jnp.mean(jnp.square(pixels.astype(jnp.float32) - truth), axis=-1)
    seen = ~hidden & valid[:, None]
    lost = hidden & valid[:, None]
    visible, masked = (
      jnp.sum(error * m) / jnp.maximum(jnp.sum(m), 1) for m in (seen, lost)
    )
    metrics = {'visible': visible, 'masked': masked}
    loss = w.visible * visible + w.masked * masked
    heads = []
    for name, value in logits.items():
      cost, metrics[f'acc_{name}'] = head_loss(
        value.astype(jnp.float32), labels[name], valid
      )
      metrics[f'ce_{name}'] = cost
      heads.append(cost)
    if heads:
      loss = loss + w.label * sum(heads) / len(heads)
    metrics['psnr'] = 10 * jnp.log10(4 / jnp.maximum(visible, 1e-10))
    flat = features.reshape(-1, features.shape[-1])
    metrics['feature_std'] = jnp.mean(jnp.std(flat, axis=0))
    return loss, (jax.lax.stop_gradient(metrics), extra)

  def artifact(self, params: PyTree, extra: PyTree) -> tuple[str, Any, PyTree]:
    """The encoder alone, as `SemanticEncoder` takes it."""
    del extra
    return 'encoder', self.cfg, {'network': params['network']}

  def pictures(
    self,
    params: PyTree,
    extra: PyTree,
    frozen: Mapping[str, PyTree],
    batch: Batch,
    rng: Array,
  ) -> dict[str, Array]:
    """Target, what half-hidden features still show, and all-visible ones."""
    del extra, frozen
    cfg = self.cfg
    images = batch['target'][:8].astype(jnp.float32)
    truth = semantic.prepare(_plain(cfg), images)
    count = patches(truth, cfg.patch).shape[:2]
    hidden = jax.random.bernoulli(rng, 0.5, count)

    def draw(hidden: Array | None) -> Array:
      pixels = self.model.apply({'params': params}, images, hidden)[1]
      return from_patches(pixels, cfg.image_size, cfg.patch)

    shown = {'target': truth, 'half_hidden': draw(hidden), 'seen': draw(None)}
    return {
      k: jnp.round((jnp.clip(v, -1, 1) + 1) * 127.5).astype(jnp.uint8)
      for k, v in shown.items()
    }


def _plain(cfg: EncoderConfig) -> EncoderConfig:
  """Reconstructs pixels in [-1, 1], whatever the network's scale."""
  return dataclasses.replace(cfg, normalize='pm1')
