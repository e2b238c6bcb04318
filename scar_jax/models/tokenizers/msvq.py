"""VAR's multi-scale tokenizer: images to token ids of several scales, and back.

In: images `[B, H, W, 3]` in [-1, 1], of `cfg.image_size` pixels. Out: ids
`[B, N]` of all scales, concatenated from small to large, latents and images
(unclamped). `accumulate` is what `orders/scale.py` asks of a tokenizer. The
structure is that of FoundationVision/VAR `VQVAE` (method 2.2, 2.3); its names
are in convert/var_vqvae.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scar_jax.models.tokenizers import layers, residual
from scar_jax.models.tokenizers.msvq_config import MSVQConfig
from scar_jax.models.tokenizers.vq import (
  Decoder,
  Encoder,
  codebook_init,
  straight_through,
)
from scar_jax.orders.scale import Accumulate
from scar_jax.sharding import annotated
from scar_jax.types import PyTree


@flax.struct.dataclass
class MSVQOutput:
  """What training needs of one pass; see also `VQOutput`.

  Attributes:
    images: reconstruction, unclamped.
    ids: of all scales.
    raw: latent as the encoder gives it.
    partial: sum of the codes up to and with each scale, with gradient to
      codebook and phi.
    queries: what each id was chosen for.
  """

  images: Float[Array, 'B H W C']
  ids: Int[Array, 'B N']
  raw: Float[Array, 'B h w C']
  partial: Float[Array, 'R B h w C']
  queries: Float[Array, 'B N C']

  @property
  def latent(self) -> Float[Array, 'B h w C']:
    """What the partial sums approach."""
    return self.raw


class _Pyramid(NamedTuple):
  """All scales of a latent; fields as in `MSVQOutput`."""

  ids: Int[Array, 'B N']
  summed: Int[Array, 'B N']  # ids whose codes were really added
  partial: Float[Array, 'R B h w C']
  queries: Float[Array, 'B N C']


class MSVQModel(nn.Module):
  """Encoder, multi-scale residual quantiser, decoder."""

  cfg: MSVQConfig

  def setup(self):
    cfg = self.cfg
    kw = dict(impl=cfg.conv_impl, dtype='float32')
    self.encoder = Encoder(cfg.backbone, name='encoder')
    self.quant_conv = layers.Conv(cfg.code_dim, name='quant_conv', **kw)
    self.post_quant_conv = layers.Conv(
      cfg.code_dim, name='post_quant_conv', **kw
    )
    self.decoder = Decoder(cfg.backbone, name='decoder')
    self.phis = [
      residual.Phi(cfg.phi_ratio, cfg.conv_impl, name=f'phi_{i}')
      for i in range(cfg.phis)
    ]
    self.codebook = self.param(
      'codebook',
      annotated(codebook_init(cfg.backbone), 'vocab', None),
      (cfg.codes, cfg.code_dim),
      jnp.float32,
    )
    self.picks = residual.phi_picks(len(cfg.patch_nums), cfg.phis)

  def features(
    self, images: Float[Array, 'B H W C'], deterministic: bool = True
  ) -> Float[Array, 'B h w C']:
    """Continuous latents before quantisation.

    Raises:
      ValueError: images of another size than the scales are made for.
    """
    size = self.cfg.image_size
    if images.shape[1:3] != (size, size):
      raise ValueError(
        f'image size {images.shape[1]}x{images.shape[2]}; accepted: '
        f'{size}x{size}, {self.cfg.side} latents of {self.cfg.downsample} '
        'pixels (set `data.image_size` or `tokenizer.patch_nums`)'
      )
    h = self.encoder(images, deterministic)
    return self.quant_conv(h.astype(jnp.float32))

  def table(self) -> Float[Array, 'V C']:
    """The codes as used everywhere: raw."""
    return jnp.asarray(self.codebook)

  def lookup(
    self, ids: Int[Array, '...'] | Float[Array, '... V']
  ) -> Float[Array, '... C']:
    """Codes of ids; of weights over all codes, their weighted sum."""
    return layers.look_up(self.table(), ids)

  def spread(
    self, k: int, codes: Float[Array, 'B n C']
  ) -> Float[Array, 'B h w C']:
    """What the codes of scale k (from 0) add to the latent."""
    return self.phis[self.picks[k]](residual.enlarge(codes, self.cfg.side))

  def quantize(
    self, raw: Float[Array, 'B h w C']
  ) -> tuple[Int[Array, 'B N'], Float[Array, 'R B h w C']]:
    """Ids of all scales, and the latent after each of them.

    Every scale codes what the scales before left over, always at full size.
    No gradient reaches `raw`.
    """
    made = self._pyramid(raw)
    return made.ids, made.partial

  def _pyramid(
    self,
    raw: Float[Array, 'B h w C'],
    mix: Float[Array, ''] | float = 1.0,
    swap: Callable[[Array], Array] | None = None,
  ) -> _Pyramid:
    """Scale by scale.

    Args:
      raw: latent.
      mix: 1 sums codes, 0 what they stand for: then the queries are residuals
        that codes can start from.
      swap: what is summed in place of the ids of a scale.
    """
    rest, total = jax.lax.stop_gradient(raw), jnp.zeros_like(raw)
    ids, summed, partial, queries = [], [], [], []
    table = jax.lax.stop_gradient(self.table())
    for k, side in enumerate(self.cfg.patch_nums):
      query = residual.shrink(rest, side)
      ids.append(residual.nearest_code(query, table, self.cfg.cosine))
      summed.append(ids[-1] if swap is None else swap(ids[-1]))
      queries.append(query.reshape(*ids[-1].shape, -1))
      codes = mix * self.lookup(summed[-1]) + (1 - mix) * queries[-1]
      added = self.spread(k, codes)
      total = total + added
      rest = rest - jax.lax.stop_gradient(added)
      partial.append(total)
    return _Pyramid(
      jnp.concatenate(ids, axis=1),
      jnp.concatenate(summed, axis=1),
      jnp.stack(partial),
      jnp.concatenate(queries, axis=1),
    )

  def encode(
    self, images: Float[Array, 'B H W C']
  ) -> tuple[Int[Array, 'B N'], Float[Array, 'B h w C']]:
    """Ids of all scales and the latents that they were made of."""
    raw = self.features(images)
    return self.quantize(raw)[0], raw

  def encode_noisy(
    self, images: Float[Array, 'B H W C'], most: float
  ) -> tuple[Int[Array, 'B N'], Int[Array, 'B N']]:
    """Ids for a decoder that is to mend its own mistakes.

    In each sample another share of the codes, up to `most`, gives way to those
    of the next sample at the same places. The scales after them code what the
    noisy sum left over, so that the ids say how to go on from a wrong start
    (FoundationVision/Infinity's self-correction). Draws from the rng 'noise'.

    Returns:
      Ids to predict, and ids that the decoder's inputs are made of.
    """
    raw = self.features(images)
    share = most * jax.random.uniform(self.make_rng('noise'), (len(raw), 1))

    def swap(ids: Array) -> Array:
      hit = jax.random.uniform(self.make_rng('noise'), ids.shape) < share
      return jnp.where(hit, jnp.roll(ids, 1, axis=0), ids)

    made = self._pyramid(raw, swap=swap)
    return made.ids, made.summed

  def split(self, ids: Int[Array, 'B N']) -> list[Int[Array, 'B n']]:
    """Ids of each scale.

    Raises:
      ValueError: another number of ids than the scales have.
    """
    sizes = self.cfg.set_sizes
    if ids.shape[1] != sum(sizes):
      raise ValueError(
        f'{ids.shape[1]} ids for scales of sides {self.cfg.patch_nums}; '
        f'accepted: {sum(sizes)} (set `tokenizer.patch_nums`)'
      )
    return jnp.split(ids, np.cumsum(sizes)[:-1], axis=1)

  def accumulate(
    self,
    k: int,
    latent: Float[Array, 'B h w C'] | None,
    ids: Int[Array, 'B n'] | Float[Array, 'B n V'],
  ) -> tuple[Float[Array, 'B h w C'], Float[Array, 'B m C'] | None]:
    """One step of sampling: adds scale k.

    Args:
      k: scale, from 0.
      latent: sum of the scales before; None before the first.
      ids: of scale k, or weights over the codes.

    Returns:
      The new sum, and it resized to the next scale, row-major: what the
      decoder sees there. None after the last scale.
    """
    added = self.spread(k, self.lookup(ids))
    latent = added if latent is None else latent + added
    if k + 1 == len(self.cfg.patch_nums):
      return latent, None
    values = residual.shrink(latent, self.cfg.patch_nums[k + 1])
    return latent, values.reshape(values.shape[0], -1, values.shape[-1])

  def tokens_to_latent(
    self, ids: Int[Array, 'B N']
  ) -> tuple[Float[Array, 'B h w C'], list[Float[Array, 'B m C']]]:
    """The whole sum, and the decoder's inputs at the scales after the first."""
    latent, values = None, []
    for k, part in enumerate(self.split(ids)):
      latent, here = self.accumulate(k, latent, part)
      values.append(here)
    return latent, values[:-1]

  def tokens_to_inputs(self, ids: Int[Array, 'B N']) -> Float[Array, 'B m C']:
    """Teacher-forcing inputs of all scales after the first, concatenated."""
    values: Sequence[jax.Array] = self.tokens_to_latent(ids)[1]
    if not values:
      return jnp.zeros((ids.shape[0], 0, self.cfg.code_dim))
    return jnp.concatenate(values, axis=1)

  def decode(
    self, latent: Float[Array, 'B h w C'], deterministic: bool = True
  ) -> Float[Array, 'B H W C']:
    """Images of a sum of codes, unclamped."""
    return self.decoder(self.post_quant_conv(latent), deterministic)

  def decode_tokens(self, ids: Int[Array, 'B N']) -> Float[Array, 'B H W C']:
    """Images of ids, unclamped; clip to [-1, 1] for pixels."""
    return self.decode(self.tokens_to_latent(ids)[0])

  def _last(self, partial: Float[Array, 'R B h w C']) -> jax.Array:
    """Sums to decode in training: of some samples those of the first scales."""
    count, batch = partial.shape[:2]
    cut, depth = jax.random.split(self.make_rng('dropout'))
    depth = jax.random.randint(depth, (batch,), 0, count)
    cut = jax.random.uniform(cut, (batch,)) < self.cfg.scale_dropout
    return partial[jnp.where(cut, depth, count - 1), jnp.arange(batch)]

  def __call__(
    self,
    images: Float[Array, 'B H W C'],
    deterministic: bool = True,
    mix: Float[Array, ''] | float = 1.0,
  ) -> MSVQOutput:
    """The training pass: straight-through codes into the decoder.

    Args:
      images: to reconstruct.
      deterministic: dropout off.
      mix: 1 decodes the codes, 0 the latents as they are.
    """
    raw = self.features(images, deterministic)
    made = self._pyramid(raw, mix)
    shortens = self.cfg.scale_dropout and not deterministic
    codes = self._last(made.partial) if shortens else made.partial[-1]
    through = straight_through(raw, codes, mix)
    return MSVQOutput(
      images=self.decode(through, deterministic),
      ids=made.ids,
      raw=raw,
      partial=made.partial,
      queries=made.queries,
    )


@functools.lru_cache(maxsize=8)
def _accumulate(cfg: MSVQConfig) -> Callable[..., Any]:
  return functools.partial(MSVQModel(cfg).apply, method='accumulate')


def accumulator(cfg: MSVQConfig, params: PyTree) -> Accumulate:
  """`MSVQModel.accumulate` with its parameters, as the scale order takes it.

  A pytree: a compiled function takes it as an argument, parameters and all.
  """
  return jax.tree_util.Partial(_accumulate(cfg), {'params': params})
