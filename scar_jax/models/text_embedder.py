"""The text part of set 0.

In: class ids, token ids of a trained byte encoder, or features of a frozen T5.
Out: embeddings `[B, T, D]` and which of their keys may be seen. Called by
`models/scar.py`. Source: FoundationVision/LlamaGen (label table, caption MLP,
null captions).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models.encoders.t5 import T5Config, T5Encoder
from scar_jax.sharding import annotated

KINDS = ('none', 'label', 't5', 'byte')


@dataclasses.dataclass(frozen=True)
class TextCondition:
  """What stands between prefix and target.

  Attributes:
    kind: 'none'; 'label' = one class token; 't5' = given features through the
      caption MLP; 'byte' = token ids through a T5 encoder trained jointly, then
      the caption MLP.
    length: positions T of 't5' and 'byte'.
    width: feature width before the caption MLP ('t5'; 'byte' has encoder's).
    classes: of 'label'; id `classes` is the null class.
    mask_pad: keys of padding are hidden from every query.
    null: 'fixed' = the null features are a constant of the checkpoint, as in
      LlamaGen; 'learned' = they are trained.
    encoder: of kind 'byte'.
    dtype: of the caption MLP.
  """

  kind: str = 't5'
  length: int = 120
  width: int = 2048
  classes: int = 1000
  mask_pad: bool = False
  null: str = 'fixed'
  encoder: T5Config | None = None
  dtype: str = 'float32'

  def __post_init__(self):
    for name, accepted in (('kind', KINDS), ('null', ('fixed', 'learned'))):
      if getattr(self, name) not in accepted:
        raise ValueError(
          f'text.{name}={getattr(self, name)!r}; accepted: '
          f'{", ".join(accepted)} (set --config.text.{name})'
        )
    if self.kind == 'byte' and self.encoder is None:
      raise ValueError(
        "text.encoder=None with text.kind='byte'; accepted: a T5Config"
      )

  @property
  def positions(self) -> int:
    """Text positions of the sequence."""
    return {'none': 0, 'label': 1}.get(self.kind, self.length)

  @property
  def features(self) -> int:
    """Width before the caption MLP."""
    return self.encoder.width if self.encoder else self.width


class TextEmbedder(nn.Module):
  """Text or class -> embeddings of set 0."""

  cfg: TextCondition
  width: int  # decoder width D

  def setup(self):
    cfg, D = self.cfg, self.width
    normal = nn.initializers.normal(0.02)
    if cfg.kind == 'label':
      init = annotated(normal, None, 'table')
      self.table = self.param('table', init, (cfg.classes + 1, D))
      return
    if cfg.kind == 'byte':
      self.encoder = T5Encoder(cfg.encoder, name='encoder')
    self.fc1 = self._dense(normal, 'fc1', 'embed', 'mlp')
    self.fc2 = self._dense(normal, 'fc2', 'mlp', 'embed')
    null = nn.initializers.normal(cfg.features**-0.5)
    self.null_text = self.param(
      'null_text', annotated(null, None, None), (cfg.length, cfg.features)
    )

  def _dense(self, init, name: str, *axes: str) -> nn.Dense:
    return nn.Dense(
      self.width,
      use_bias=False,
      dtype=self.cfg.dtype,
      kernel_init=annotated(init, *axes),
      name=name,
    )

  def label(
    self, label: Int[Array, ' B'], null: Bool[Array, ' B']
  ) -> Float[Array, 'B 1 D']:
    """One token per class; `null` rows get the null class."""
    ids = jnp.where(null, self.cfg.classes, label)
    return jnp.asarray(self.table)[ids][:, None]

  def text(
    self,
    text: Int[Array, 'B T'] | Float[Array, 'B T F'],
    mask: Bool[Array, 'B T'],
    null: Bool[Array, ' B'],
  ) -> tuple[Float[Array, 'B T D'], Bool[Array, 'B T']]:
    """Embeddings, and the keys that may be seen.

    Args:
      text: token ids ('byte') or frozen features ('t5').
      mask: True at real tokens. An all-False row is the null condition.
      null: rows whose features become the null features. They keep their own
        mask, as in LlamaGen, unless that is all False.

    Raises:
      ValueError: another number of positions or features than configured.
    """
    cfg = self.cfg
    empty = ~jnp.any(mask, axis=-1)
    null = null | empty
    if cfg.kind == 'byte':
      # One visible key keeps the softmax of an empty row finite.
      seen = mask.at[:, 0].set(mask[:, 0] | empty)
      text = self.encoder(text, seen)
    if text.shape[1:] != (cfg.length, cfg.features):
      raise ValueError(
        f'text features {text.shape[1:]} do not fit; accepted: '
        f'{(cfg.length, cfg.features)} (set --config.text.length)'
      )
    null_text = jnp.asarray(self.null_text)
    if cfg.null == 'fixed':
      null_text = jax.lax.stop_gradient(null_text)
    features = jnp.where(
      null[:, None, None], null_text, text.astype(jnp.float32)
    )
    x = self.fc2(jax.nn.gelu(self.fc1(features), approximate=True))
    if not cfg.mask_pad:
      mask = jnp.ones_like(mask)
    return x.astype(jnp.float32), mask | empty[:, None]
