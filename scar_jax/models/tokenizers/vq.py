"""The LlamaGen VQ tokenizer: images to a grid of code ids and back.

In: images `[B, H, W, 3]` in [-1, 1], sides divisible by `cfg.downsample`.
Out: ids `[B, h, w]`, latents and codes `[B, h, w, C]`, images (unclamped).
The training task and everything that needs tokens call it; the structure is
that of FoundationVision/LlamaGen `VQModel` (names in convert/llamagen_vq.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scar_jax.models.tokenizers import layers
from scar_jax.sharding import annotated, constrain


@dataclasses.dataclass(frozen=True)
class VQConfig:
  """Sizes of a `VQModel`; the defaults are VQ-16."""

  codes: int = 16384  # V, codebook entries
  code_dim: int = 8  # C, channels of one code
  l2_norm: bool = True  # codes and latents of unit length
  ch: int = 128  # base width
  ch_mult: tuple[int, ...] = (
    1,
    1,
    2,
    2,
    4,
  )  # per level, high to low resolution
  res_blocks: int = 2  # per encoder level; the decoder has one more
  z_channels: int = 256  # between encoder or decoder and the 1x1 convs
  groups: int = 32  # of the group norms; 0: norm per position
  attn: bool = True  # attention at the lowest level
  patch: int = 1  # pixels per side that enter as channels
  skip: bool = False  # linear paths around encoder and decoder
  local: bool = False  # the encoder sees each token's pixels alone
  dropout: float = 0.0
  conv_impl: str = 'auto'  # 'auto' | 'xla' | 'matmul'
  dtype: str = 'float32'  # compute

  def __post_init__(self):
    layers.check_impl(self.conv_impl)
    if self.groups:
      for mult in self.ch_mult:
        if self.ch * mult % self.groups:
          raise ValueError(
            f'tokenizer.groups={self.groups} does not divide '
            f'{self.ch * mult} channels (ch {self.ch} x {mult}); accepted: a '
            'common divisor of all levels, or 0 (set `groups`)'
          )

  @property
  def downsample(self) -> int:
    """Pixels per token and side."""
    return self.patch * 2 ** (len(self.ch_mult) - 1)


_SIZES: dict[str, dict[str, Any]] = {
  'vq16': {},
  'vq8': dict(ch_mult=(1, 2, 2, 4)),
  'tiny': dict(
    codes=1024, code_dim=48, l2_norm=False, ch=48, ch_mult=(1,), res_blocks=1,
    z_channels=48, groups=0, attn=False, patch=4, skip=True, local=True,
  ),
}  # fmt: skip


def vq_config(size: str, **overrides: Any) -> VQConfig:
  """A config by size name.

  Args:
    size: 'vq16', 'vq8' (72M and 70M parameters) or 'tiny' (4 pixels a token).
    **overrides: fields that differ.

  Raises:
    ValueError: unknown size.
  """
  return VQConfig(**(fields_of_size(_SIZES, size) | overrides))


def fields_of_size(
  sizes: Mapping[str, dict[str, Any]], size: str
) -> dict[str, Any]:
  """What a named size sets in the config of a tokenizer.

  Raises:
    ValueError: unknown size; lists the known ones.
  """
  if size not in sizes:
    raise ValueError(
      f'tokenizer size {size!r}; accepted: {sorted(sizes)} (set '
      '`tokenizer.size`)'
    )
  return sizes[size]


@flax.struct.dataclass
class VQOutput:
  """What training needs of one pass.

  `partial` and `queries` mean what they do in `MSVQOutput`: the training task
  treats one scale as the special case of many.
  """

  images: jax.Array  # [B, H, W, 3] reconstruction, unclamped
  ids: jax.Array  # [B, h, w]
  raw: jax.Array  # [B, h, w, C] latent as the encoder gives it
  latent: jax.Array  # [B, h, w, C] normalised if the config says so
  codes: jax.Array  # [B, h, w, C] the chosen codes, with gradient
  distances: jax.Array  # [B, h, w, V] squared

  @property
  def partial(self) -> Float[Array, '1 B h w C']:
    """The codes, as the sum of the only scale."""
    return self.codes[None]

  @property
  def queries(self) -> Float[Array, 'B h w C']:
    """What each id was chosen for."""
    return self.latent


def normalize(x: Float[Array, '... C']) -> Float[Array, '... C']:
  """Unit length over the last axis; the norm counts as at least 1e-12."""
  # The root of a zero sum has no gradient; the clamp goes inside.
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class Encoder(nn.Module):
  """Images to `[B, h, w, z_channels]`."""

  cfg: VQConfig

  @nn.compact
  def __call__(
    self, images: Float[Array, 'B H W C'], deterministic: bool = True
  ) -> Float[Array, 'B h w Z']:
    cfg = self.cfg
    if cfg.local:
      return self._local(images)
    kw = dict(impl=cfg.conv_impl, dtype=cfg.dtype)
    res = dict(groups=cfg.groups, dropout=cfg.dropout, **kw)
    last = len(cfg.ch_mult) - 1
    x = layers.space_to_depth(images, cfg.patch)
    x = layers.Conv(cfg.ch, name='conv_in', **kw)(x)
    for level, mult in enumerate(cfg.ch_mult):
      name = f'level_{level}'
      for b in range(cfg.res_blocks):
        x = layers.ResnetBlock(cfg.ch * mult, name=f'{name}_res_{b}', **res)(
          x, deterministic
        )
        if level == last and cfg.attn:
          x = layers.AttnBlock(cfg.groups, cfg.dtype, name=f'{name}_attn_{b}')(
            x
          )
      if level != last:
        x = layers.Downsample(name=f'{name}_down', **kw)(x)
      x = constrain(x, 'batch', None, None, None)
    x = _middle(cfg, x, res, deterministic)
    x = nn.swish(layers.Norm(cfg.groups, cfg.dtype, name='norm_out')(x))
    x = layers.Conv(cfg.z_channels, name='conv_out', **kw)(x)
    if cfg.skip:
      # A linear autoencoder of patches from the first step on: it keeps the
      # colours of flat areas, which the norms take out of the deep path.
      flat = layers.space_to_depth(images, cfg.downsample)
      x = x + _pointwise(cfg, cfg.z_channels)(flat)
    return x

  def _local(self, images: Float[Array, 'B H W C']) -> Float[Array, 'B h w Z']:
    """A linear map of each token's pixels, at first one that keeps distances.

    Equal pixels then get equal codes wherever they are. With few codes that is
    worth more than what the neighbours could add: a model over the codes need
    not learn which of many stand for one colour.
    """
    flat = layers.space_to_depth(images, self.cfg.downsample)
    return _pointwise(
      self.cfg,
      self.cfg.z_channels,
      'local',
      kernel_init=nn.initializers.orthogonal(),
    )(flat)


class Decoder(nn.Module):
  """`[B, h, w, z_channels]` to images; levels run from low resolution up."""

  cfg: VQConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B h w Z'], deterministic: bool = True
  ) -> Float[Array, 'B H W C']:
    cfg = self.cfg
    kw = dict(impl=cfg.conv_impl, dtype=cfg.dtype)
    res = dict(groups=cfg.groups, dropout=cfg.dropout, **kw)
    last = len(cfg.ch_mult) - 1
    latent = x
    x = layers.Conv(cfg.ch * cfg.ch_mult[-1], name='conv_in', **kw)(x)
    x = _middle(cfg, x, res, deterministic)
    for level, mult in enumerate(reversed(cfg.ch_mult)):
      name = f'level_{level}'
      for b in range(cfg.res_blocks + 1):
        x = layers.ResnetBlock(cfg.ch * mult, name=f'{name}_res_{b}', **res)(
          x, deterministic
        )
        if level == 0 and cfg.attn:
          x = layers.AttnBlock(cfg.groups, cfg.dtype, name=f'{name}_attn_{b}')(
            x
          )
      if level != last:
        x = layers.Upsample(name=f'{name}_up', **kw)(x)
      x = constrain(x, 'batch', None, None, None)
    x = nn.swish(layers.Norm(cfg.groups, cfg.dtype, name='norm_out')(x))
    x = layers.Conv(3 * cfg.patch**2, name='conv_out', **kw)(x)
    x = layers.depth_to_space(x, cfg.patch)
    if cfg.skip:
      flat = _pointwise(cfg, 3 * cfg.downsample**2)(latent)
      x = x + layers.depth_to_space(flat, cfg.downsample)
    return x.astype(jnp.float32)


def _pointwise(
  cfg: VQConfig, features: int, name: str = 'skip', **kw: Any
) -> layers.Conv:
  return layers.Conv(
    features,
    window=1,
    padding=((0, 0), (0, 0)),
    dtype=cfg.dtype,
    name=name,
    **kw,
  )


def _middle(
  cfg: VQConfig, x: jax.Array, res: dict[str, Any], deterministic: bool
) -> jax.Array:
  """res, attention, res at the lowest resolution; called inside compact."""
  width = cfg.ch * cfg.ch_mult[-1]
  x = layers.ResnetBlock(width, name='mid_0', **res)(x, deterministic)
  if cfg.attn:
    x = layers.AttnBlock(cfg.groups, cfg.dtype, name='mid_1')(x)
  return layers.ResnetBlock(width, name='mid_2', **res)(x, deterministic)


class VQModel(nn.Module):
  """Encoder, quantiser and decoder with one codebook."""

  cfg: VQConfig

  def setup(self):
    cfg = self.cfg
    one = dict(window=1, padding=((0, 0), (0, 0)), dtype='float32')
    self.encoder = Encoder(cfg, name='encoder')
    keep = dict(kernel_init=nn.initializers.orthogonal()) if cfg.local else {}
    self.quant_conv = layers.Conv(
      cfg.code_dim, name='quant_conv', **one, **keep
    )
    self.post_quant_conv = layers.Conv(
      cfg.z_channels, name='post_quant_conv', **one
    )
    self.decoder = Decoder(cfg, name='decoder')
    self.codebook = self.param(
      'codebook',
      annotated(codebook_init(cfg), 'vocab', None),
      (cfg.codes, cfg.code_dim),
      jnp.float32,
    )

  def table(self) -> Float[Array, 'V C']:
    """The codes as used everywhere: of unit length if `l2_norm`."""
    return normalize(self.codebook) if self.cfg.l2_norm else self.codebook

  def features(
    self, images: Float[Array, 'B H W C'], deterministic: bool = True
  ) -> Float[Array, 'B h w C']:
    """Continuous latents before normalisation and quantisation.

    Raises:
      ValueError: a side is not a multiple of `cfg.downsample`.
    """
    factor = self.cfg.downsample
    if images.shape[1] % factor or images.shape[2] % factor:
      raise ValueError(
        f'image size {images.shape[1]}x{images.shape[2]}; accepted: multiples '
        f'of the tokenizer factor {factor} (set `data.image_size`)'
      )
    h = self.encoder(images, deterministic)
    return self.quant_conv(h.astype(jnp.float32))

  def quantize(
    self, raw: Float[Array, 'B h w C']
  ) -> tuple[Int[Array, 'B h w'], Float[Array, 'B h w C'], jax.Array]:
    """Nearest code of each latent: ids, used latents, squared distances."""
    latent = normalize(raw) if self.cfg.l2_norm else raw
    table = self.table()
    dots = jnp.einsum(
      'bhwc,vc->bhwv', latent, table, precision=jax.lax.Precision.HIGHEST
    )
    distances = (
      jnp.sum(jnp.square(latent), -1, keepdims=True)
      + jnp.sum(jnp.square(table), -1)
      - 2.0 * dots
    )
    ids = jnp.argmin(distances, axis=-1).astype(jnp.int32)
    return ids, latent, distances

  def encode(
    self, images: Float[Array, 'B H W C']
  ) -> tuple[Int[Array, 'B h w'], Float[Array, 'B h w C']]:
    """Code ids and the latents that chose them (normalised if `l2_norm`)."""
    ids, latent, _ = self.quantize(self.features(images))
    return ids, latent

  def lookup(
    self, ids: Int[Array, '...'] | Float[Array, '... V']
  ) -> Float[Array, '... C']:
    """Codes of ids; of weights over all codes, their weighted sum."""
    return layers.look_up(self.table(), ids)

  def decode(
    self, codes: Float[Array, 'B h w C'], deterministic: bool = True
  ) -> Float[Array, 'B H W C']:
    """Images of codes, unclamped."""
    return self.decoder(self.post_quant_conv(codes), deterministic)

  def decode_tokens(self, ids: Int[Array, 'B h w']) -> Float[Array, 'B H W C']:
    """Images of ids, unclamped; clip to [-1, 1] for pixels."""
    return self.decode(self.lookup(ids))

  def __call__(
    self,
    images: Float[Array, 'B H W C'],
    deterministic: bool = True,
    mix: Float[Array, ''] | float = 1.0,
  ) -> VQOutput:
    """The training pass: straight-through codes into the decoder.

    Args:
      images: to reconstruct.
      deterministic: dropout off.
      mix: 1 decodes the codes, 0 the latents as they are.
    """
    raw = self.features(images, deterministic)
    ids, latent, distances = self.quantize(raw)
    codes = self.lookup(ids)
    through = straight_through(latent, codes, mix)
    return VQOutput(
      images=self.decode(through, deterministic),
      ids=ids,
      raw=raw,
      latent=latent,
      codes=codes,
      distances=distances,
    )


def straight_through(
  latent: Float[Array, 'B h w C'],
  codes: Float[Array, 'B h w C'],
  mix: Float[Array, ''] | float = 1.0,
) -> Float[Array, 'B h w C']:
  """The value of `codes`, at `mix` of the way, the gradient of `latent`."""
  return latent + mix * jax.lax.stop_gradient(codes - latent)


def codebook_init(cfg: VQConfig):
  """Initialiser of a codebook: uniform, normalised if the codes are."""

  def init(key, shape, dtype):
    bound = 1.0 / cfg.codes
    rows = jax.random.uniform(key, shape, dtype, -bound, bound)
    return normalize(rows) if cfg.l2_norm else rows

  return init
