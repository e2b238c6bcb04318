"""Task 'tokenizer': a VQ autoencoder of target images, of one or more scales.

In: batches with `target` (and `valid`). Out: reconstruction, perceptual,
quantiser and adversarial losses in one scalar (method 2.1), codebook metrics,
and the artifact that SCAR reads. Generator and discriminator share the step:
`stop_gradient` keeps each from moving the other, `labels` gives each its own
optimiser group.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scar_jax import objectives
from scar_jax.config_values import check_multiple, choice, number
from scar_jax.models.tokenizers import codebook, perceptual
from scar_jax.models.tokenizers.gan import PatchDiscriminator
from scar_jax.models.tokenizers.inverse import start_inverse
from scar_jax.models.tokenizers.make import (
  TokenizerConfig,
  is_multi_scale,
  make_tokenizer,
  tokenizer_config,
)
from scar_jax.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class TokenizerModel:
  """Section `model`; 0, () and '' mean: by size."""

  size: str = 'tiny'  # 'vq16', 'vq8', 'var256', ... or 'tiny'
  patch_nums: tuple[int, ...] = ()  # sides of the scales; (): one scale, a grid
  codes: int = number(0, 0)  # codebook entries
  code_dim: int = number(0, 0)  # channels of a code
  ch: int = number(0, 0)  # base width
  ch_mult: tuple[int, ...] = ()  # per level
  res_blocks: int = number(0, 0)  # per level
  z_channels: int = number(0, 0)
  groups: int = number(-1, -1)  # -1: by size; 0: norm per position
  patch: int = number(0, 0)  # pixels per side that enter as channels
  attn: str = choice('', '', 'on', 'off')
  l2_norm: str = choice('', '', 'on', 'off')  # codes of unit length
  skip: str = choice('', '', 'on', 'off')  # linear paths around the networks
  local: str = choice('', '', 'on', 'off')  # encoder by token
  dropout: float = number(0.0, 0.0, 1.0)
  phis: int = number(0, 0)  # modules after enlarged codes, shared by the scales
  scale_dropout: float = number(0.0, 0.0, 1.0)  # samples cut to first scales
  conv_impl: str = choice('auto', 'auto', 'xla', 'matmul')
  dtype: str = 'float32'


@dataclasses.dataclass(frozen=True)
class TokenizerLoss:
  """Section `loss`: weights, and what keeps the codebook alive."""

  mse: float = number(1.0, 0.0)
  l1: float = number(0.0, 0.0)
  perceptual: float = number(1.0, 0.0)
  lpips_path: str = ''  # VGG16 and lpips weights; '' is the embedded distance
  codebook: float = number(1.0, 0.0)
  commit: float = number(0.25, 0.0)
  entropy: float = number(0.0, 0.0)
  gan: float = number(0.0, 0.0)  # 0: no discriminator; the paper's is 0.5
  gan_start: int = number(20000, 0)  # first step with adversarial losses
  gan_ch: int = number(64, 1)
  gan_layers: int = number(3, 1)
  vq_start: int = number(0, 0)  # steps that decode unquantised latents
  kmeans_iters: int = number(0, 0)  # codes from latents at `vq_start`; 0: off
  dead_after: int = number(0, 0)  # steps unused until a code moves; 0: never
  window: int = number(100, 1)  # steps over which usage is measured


SECTIONS: dict[str, type] = {'model': TokenizerModel, 'loss': TokenizerLoss}


def model_config(model: TokenizerModel) -> TokenizerConfig:
  """The config that the section describes.

  Raises:
    ValueError: an unknown size, or a field of the other kind of tokenizer.
  """
  given = dataclasses.asdict(model)
  size, groups = given.pop('size'), given.pop('groups')
  values = {k: v for k, v in given.items() if v}
  if groups >= 0:
    values['groups'] = groups
  for switch in ('attn', 'l2_norm', 'skip', 'local'):
    if switch in values:
      values[switch] = values[switch] == 'on'
  return tokenizer_config(size, **values)


def make_task(config: Any, artifacts: Mapping[str, Any]) -> 'TokenizerTask':
  """The task of a checked `Config`; needs no artifacts.

  Raises:
    ValueError: unknown size, or an image size that the model cannot take.
  """
  del artifacts
  cfg = model_config(config.model)
  check_multiple(
    'data.image_size',
    config.data.image_size,
    cfg.downsample,
    'the pixels of a token',
  )
  return TokenizerTask(cfg, config.loss)


class TokenizerTask:
  """See `scar_jax.train.tasks.Task`.

  Attributes:
    cfg: of the model.
    weights: the loss section.
    frozen: 'lpips' if weights were given.
  """

  name = 'tokenizer'

  def __init__(self, cfg: TokenizerConfig, weights: TokenizerLoss):
    if weights.entropy and is_multi_scale(cfg):
      raise ValueError(
        f'loss.entropy={weights.entropy} with a multi-scale tokenizer, whose '
        'ids carry no gradient; accepted: 0 (set --config.loss.entropy)'
      )
    self.cfg = cfg
    self.weights = weights
    self.model = make_tokenizer(cfg)
    self.frozen: dict[str, PyTree] = {}
    if weights.perceptual and weights.lpips_path:
      self.frozen['lpips'] = perceptual.load_lpips(weights.lpips_path)
    self._disc = None
    if weights.gan:
      self._disc = PatchDiscriminator(
        weights.gan_ch, weights.gan_layers, cfg.conv_impl, cfg.dtype
      )

  def init(self, rng: Array, batch: Batch) -> dict[str, PyTree]:
    """Variables 'params' (vq, disc), 'codes' and 'batch_stats'."""
    vq_rng, disc_rng = jax.random.split(rng)
    images = batch['target']
    fresh = self.model.init(vq_rng, images)['params']
    if getattr(self.cfg, 'local', False) and self.cfg.skip:
      fresh = start_inverse(fresh)
    out = {
      'params': {'vq': fresh},
      'codes': codebook.init_usage(self.cfg.codes, self.cfg.code_dim),
    }
    if self._disc is not None:
      disc = self._disc.init(disc_rng, images, train=True)
      out['params']['disc'] = disc['params']
      out['batch_stats'] = disc['batch_stats']
    return out

  def labels(self, params: PyTree) -> PyTree:
    """'main' for the autoencoder, 'discriminator' for the other."""
    names = {'vq': 'main', 'disc': 'discriminator'}
    return {
      k: jax.tree.map(lambda _, name=names[k]: name, tree)
      for k, tree in params.items()
    }

  def loss(
    self,
    params: PyTree,
    extra: PyTree,
    frozen: Mapping[str, PyTree],
    batch: Batch,
    rng: Array,
    train: bool,
  ) -> tuple[Float[Array, ''], tuple[dict[str, Float[Array, '']], PyTree]]:
    """See the protocol. `loss` holds both players' terms."""
    w = self.weights
    truth = batch['target'].astype(jnp.float32)
    valid = batch.get('valid')
    drop_rng, pool_rng = jax.random.split(rng)
    step = extra['codes']['step']
    mix = jnp.where(step >= w.vq_start, 1.0, 0.0)
    out = self.model.apply(
      {'params': params['vq']},
      truth,
      deterministic=not train,
      mix=mix,
      rngs={'dropout': drop_rng},
    )
    gap = out.images - truth
    terms = {
      'mse': w.mse * objectives.masked_mean(jnp.square(gap), valid),
      'l1': w.l1 * objectives.masked_mean(jnp.abs(gap), valid),
      'perceptual': self._perceptual(out.images, truth, frozen, valid),
      'codebook': w.codebook
      * objectives.over_scales(
        objectives.codebook_loss, out.latent, out.partial, valid
      ),
      'commit': mix
      * objectives.over_scales(
        objectives.commitment_loss, out.latent, out.partial, w.commit, valid
      ),
    }
    if w.entropy:
      terms['entropy'] = w.entropy * objectives.entropy_loss(out.distances)
    new_extra = dict(extra)
    if self._disc is not None:
      adversarial, new_extra['batch_stats'] = self._adversarial(
        params['disc'], extra['batch_stats'], out.images, truth, valid, train
      )
      on = jnp.where(step >= w.gan_start, w.gan, 0.0)
      terms |= {k: on * v for k, v in adversarial.items()}
    loss = sum(terms.values())
    if train:
      new_extra['codes'] = codebook.update_usage(
        extra['codes'], out.ids, out.queries, valid, pool_rng, w.window
      )
    else:
      new_extra = extra
    metrics = {k: v for k, v in terms.items() if getattr(w, k, True)}
    metrics |= codebook.usage_metrics(new_extra['codes'], w.window)
    metrics['psnr'] = objectives.psnr(out.images, truth, valid)
    return loss, (jax.lax.stop_gradient(metrics), new_extra)

  def _perceptual(
    self,
    images: Array,
    truth: Array,
    frozen: Mapping[str, PyTree],
    valid: Array | None,
  ) -> Array:
    if not self.weights.perceptual:
      return jnp.zeros((), jnp.float32)
    if 'lpips' in frozen:
      net = perceptual.LPIPS(self.cfg.conv_impl)
      distance = net.apply({'params': frozen['lpips']}, images, truth)
    else:
      distance = perceptual.embedded_distance(images, truth)
    return self.weights.perceptual * objectives.masked_mean(distance, valid)

  def _adversarial(
    self,
    params: PyTree,
    stats: PyTree,
    fake: Array,
    truth: Array,
    valid: Array | None,
    train: bool,
  ) -> tuple[dict[str, Array], PyTree]:
    """Hinge terms of both players and the new running statistics."""

    def score(params: PyTree, stats: PyTree, images: Array):
      scores, new = self._disc.apply(
        {'params': params, 'batch_stats': stats},
        images,
        train=train,
        mutable=['batch_stats'],
      )
      return scores, new['batch_stats']

    # The generator sees a fixed discriminator, and the other way round.
    fooled, _ = score(jax.lax.stop_gradient(params), stats, fake)
    on_real, stats = score(params, stats, truth)
    on_fake, stats = score(params, stats, jax.lax.stop_gradient(fake))
    terms = {
      'gan_g': objectives.hinge_g(fooled, valid),
      'gan_d': objectives.hinge_d(on_real, on_fake, valid),
    }
    return terms, stats

  def post_update(
    self, params: PyTree, extra: PyTree, rng: Array, step: Array
  ) -> tuple[PyTree, PyTree]:
    """Codes from latents at `vq_start`; dead codes moved; runs in the step."""
    w = self.weights
    codes, usage = params['vq']['codebook'], extra['codes']
    if w.kmeans_iters:
      codes = jax.lax.cond(
        step + 1 == w.vq_start,
        lambda: codebook.kmeans(
          usage['pool'], self.cfg.codes, w.kmeans_iters, self.cfg.l2_norm, rng
        ),
        lambda: codes,
      )
    if w.dead_after:
      live = step + 1 > w.vq_start
      codes, usage = codebook.revive(codes, usage, w.dead_after, live, rng)
    usage = {**usage, 'step': step + 1}
    params = {**params, 'vq': {**params['vq'], 'codebook': codes}}
    return params, {**extra, 'codes': usage}

  def artifact(self, params: PyTree, extra: PyTree) -> tuple[str, Any, PyTree]:
    """The autoencoder alone."""
    del extra
    return 'tokenizer', self.cfg, params['vq']

  def pictures(
    self,
    params: PyTree,
    extra: PyTree,
    frozen: Mapping[str, PyTree],
    batch: Batch,
    rng: Array,
  ) -> dict[str, Array]:
    """Truth and reconstruction of the first images, uint8."""
    del extra, frozen, rng
    truth = batch['target'][:8]
    out = self.model.apply({'params': params['vq']}, truth)
    pixels = {'target': truth, 'reconstruction': out.images}
    return {
      k: jnp.round((jnp.clip(v, -1, 1) + 1) * 127.5).astype(jnp.uint8)
      for k, v in pixels.items()
    }
