"""The frozen config of the assembled model, and its checks.

In: the configs of the parts and the flags of method section 12. Out: derived
objects (`order`, `layout`) that `models/scar.py` and `sampling.py` build on.
Plain fields only, so that an artifact can store it as JSON.
"""

import dataclasses
import functools

from scar_jax.models.decoder import DecoderConfig
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.text_embedder import TextCondition
from scar_jax.orders.layout import Layout, Order, make_layout
from scar_jax.orders.random import RandomOrder
from scar_jax.orders.raster import RasterOrder
from scar_jax.orders.scale import ScaleOrder

_CHOICES = {
  'order': ('raster', 'scale', 'random'),
  'prefix_mask': ('bidirectional', 'causal'),
  'prefix_rope': ('offset_p', 'offset_g', 'aligned', 'none'),
  'prefix_ada': ('class', 'null'),
  'text_rope': ('zero', 'identity'),
  'cond_dropout': ('text', 'joint'),
  'token_dropout_scope': ('all', 'text'),
  'places': ('normal', 'sincos', 'rotary'),
  'align_hidden': ('post_norm', 'pre_norm'),
}


@dataclasses.dataclass(frozen=True)
class ScarConfig:
  """Condition image + text + order -> logits.

  Attributes:
    decoder: the set-causal decoder.
    prefix: compressed semantic prefill; `out` is the decoder's width.
    text: text or class condition.
    order: 'raster', 'scale' or 'random'. The scale order is VAR's: its decoder
      has the adaln block, whose condition vector is the class (in place of a
      class token) or the pooled text (beside the text's tokens).
    grid: (h, w) of the target tokens; of the last scale.
    num_sets: sets of the random order.
    train_sets: numbers of sets of which every training pass draws one (random
      order); () is `num_sets`.
    patch_nums: sides of the scale order.
    latent_dim: channels of the latents that the scale order sees.
    places: its tables of places start as 'normal' noise (VAR), or as 'sincos'
      of where they lie, so that prefix and scales know from the first step what
      is beside what; with 'rotary' queries and keys are rotated by it too, as
      in the other orders (the idea of FoundationVision/Infinity).
    prefix_mask: 'bidirectional' (paper) or 'causal' (official code).
    prefix_rope: where prefix and target lie in RoPE coordinates.
    prefix_ada: which condition vector modulates the set-0 positions of the
      scale order: 'class', the sample's own, or 'null', that of the null class,
      whatever the label or text. Then all guidance branches on the class have
      one prefix, and the sampler computes it once.
    text_rope: 'zero' for LlamaGen weights, 'identity' from scratch.
    cond_dropout: 'text' or 'joint'; see `conditions.drop_conditions`.
    text_dropout: rate of null text in training.
    prefix_dropout: rate of null prefixes in training, 'joint' only.
    token_dropout: rate on embeddings of text, or of text and target.
    token_dropout_scope: 'text' or 'all'; never the prefix.
    token_noise: largest share of target inputs replaced by those of another
      sample, drawn per sample, in training; in the scale order the targets
      follow, see `MSVQModel.encode_noisy`.
    context_dropout: share of samples in training all of whose target inputs
      are replaced; not of the scale order.
    align_hidden: 'post_norm', or 'pre_norm' with a non-affine LayerNorm on
      both sides of the alignment.
  """

  decoder: DecoderConfig = DecoderConfig()
  prefix: PrefixConfig = PrefixConfig()
  text: TextCondition = TextCondition()
  order: str = 'raster'
  grid: tuple[int, int] = (32, 32)
  num_sets: int = 16
  train_sets: tuple[int, ...] = ()
  patch_nums: tuple[int, ...] = ()
  latent_dim: int = 32
  places: str = 'normal'
  prefix_mask: str = 'bidirectional'
  prefix_rope: str = 'offset_p'
  prefix_ada: str = 'class'
  text_rope: str = 'zero'
  cond_dropout: str = 'text'
  text_dropout: float = 0.1
  prefix_dropout: float = 0.1
  token_dropout: float = 0.1
  token_dropout_scope: str = 'text'
  token_noise: float = 0.0
  context_dropout: float = 0.0
  align_hidden: str = 'post_norm'

  def __post_init__(self):
    for name, accepted in _CHOICES.items():
      if getattr(self, name) not in accepted:
        raise ValueError(
          f'{name}={getattr(self, name)!r}; accepted: {", ".join(accepted)} '
          '(set it in the model section of the config)'
        )
    prefix = self.prefix
    self._check_scale()
    if prefix.compress != 'off' and prefix.out != self.decoder.width:
      raise ValueError(
        f'prefix.out={prefix.out}; accepted: the decoder width '
        f'{self.decoder.width} (set --config.model.width)'
      )
    if self.cond_dropout == 'joint' and prefix.compress == 'off':
      raise ValueError(
        "cond_dropout='joint' without a prefix; accepted: 'text' "
        '(set --config.model.cond_dropout)'
      )
    if not prefix.positions + self.text.positions:
      raise ValueError(
        'a model without prefix and without text has nothing to start from; '
        'accepted: at least one (set --config.prefix.compress, prefix.inject '
        'or text.kind)'
      )
    self.make_layout()  # the order's own checks

  def _check_scale(self) -> None:
    """The scale order and the adaln block come together."""
    if (self.order == 'scale') != (self.decoder.block == 'adaln'):
      raise ValueError(
        f'order={self.order!r} with block={self.decoder.block!r}; accepted: '
        "'scale' with 'adaln', the other orders with 'llama' "
        '(set --config.order.name and model.size)'
      )
    if self.order != 'random' and self.train_sets:
      raise ValueError(
        f'train_sets={self.train_sets} with order={self.order!r}, whose sets '
        "are fixed; accepted: (), or order='random' "
        '(set --config.order.train_sets)'
      )
    if self.order != 'scale':
      if self.prefix_ada != 'class':
        raise ValueError(
          f'prefix_ada={self.prefix_ada!r} with order={self.order!r}, whose '
          "blocks have no condition vector; accepted: 'class' "
          '(set --config.prefix.ada)'
        )
      return
    if self.places != 'normal' and self.decoder.width % 4:
      raise ValueError(
        f'places={self.places!r} with width {self.decoder.width}; accepted: a '
        'multiple of 4 (set --config.model.width)'
      )
    if self.context_dropout:
      raise ValueError(
        f"context_dropout={self.context_dropout} with order='scale', whose "
        'inputs are no tokens; accepted: 0 '
        '(set --config.model.context_dropout)'
      )
    if self.grid != (self.patch_nums or (0,))[-1:] * 2:
      raise ValueError(
        f'patch_nums={self.patch_nums} for a token grid of {self.grid}; '
        'accepted: square grids, the last scale as large as the grid '
        '(set --config.model.patch_nums of the tokenizer)'
      )
    if self.prefix.from_tokens:
      raise ValueError(
        f"prefix.compress={self.prefix.compress!r} with order='scale', which "
        'has no token embeddings; accepted: a prefix of encoder features '
        '(set --config.prefix.compress)'
      )

  def make_order(self) -> Order:
    """The order object of the target."""
    if self.order == 'scale':
      return ScaleOrder(self.patch_nums)
    if self.order == 'random':
      sets = tuple(self.train_sets)
      return RandomOrder(self.grid, self.num_sets, train_sets=sets)
    return RasterOrder(self.grid)

  def make_layout(self) -> Layout:
    """Set ids and positions of a training sequence."""
    return _layout(self)

  @property
  def text_len(self) -> int:
    """Text positions of the sequence; VAR's class is no position."""
    no_token = self.order == 'scale' and self.text.kind == 'label'
    return 0 if no_token else self.text.positions

  @property
  def one_prefix(self) -> bool:
    """Set 0 is the same whatever the class, so branches on it may share it."""
    return self.prefix_ada == 'null' and not self.text_len

  @property
  def shared_len(self) -> int:
    """First positions that are the same whatever the text or class.

    All of set 0, or the prefix where its mask hides the text from it. With the
    paper's mask the prefix sees the text, and nothing is shared.
    """
    if self.one_prefix:
      return self.prefix.positions
    own = self.order != 'scale' or self.prefix_ada == 'null'
    return self.prefix.positions if own and self.prefix_mask == 'causal' else 0

  @property
  def has_null_prefix(self) -> bool:
    """A null prefix exists, so guidance on the image is possible."""
    return self.cond_dropout == 'joint'

  @property
  def aligns(self) -> bool:
    """Alignment is defined: a prefix that comes from encoder features."""
    return self.prefix.seq_grid is not None and not self.prefix.from_tokens


@functools.lru_cache(maxsize=64)
def _layout(cfg: ScarConfig) -> Layout:
  return make_layout(
    cfg.make_order(),
    cfg.prefix.seq_grid,
    cfg.text_len,
    prefix_mask=cfg.prefix_mask,
    prefix_rope=cfg.prefix_rope,
    text_rope=cfg.text_rope,
  )
