"""The assembled model: condition + text + order -> logits and loss terms.

In: target tokens `[B, N]` and `Conditions`. Out: `ScarOutput` for training;
`prefill` and `decode` for the sampler. The sequence is always
[prefix; text; target inputs], masked by set ids alone; the scale order turns
class or text into the blocks' condition vector too. Called by the task and
`sampling.py`. Source: method 3.7, 4, 7.1, 9.1.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from scar_jax.models.cache import KVCache, repeat_rows
from scar_jax.models.conditions import Conditions, dropped, given
from scar_jax.models.decoder import Modulation, SetDecoder, make_cache
from scar_jax.models.inject import Injection, Injector, read_by
from scar_jax.models.layers import apply_rope, layer_norm, rope_table
from scar_jax.models.prefill import Compressor
from scar_jax.models.scale_inputs import ScaleInputs
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.text_embedder import TextEmbedder
from scar_jax.models.token_noise import exchanged
from scar_jax.orders.layout import CONTENT, QUERY, Inputs
from scar_jax.orders.scale import Accumulate
from scar_jax.sharding import annotated, constrain


@struct.dataclass
class ScarOutput:
  """A training forward pass.

  Attributes:
    logits: float32, one row per target in target order; None if not wanted.
    targets: the tokens these rows predict.
    predictors: what the head makes the logits of.
    hidden: states of all positions after the final norm.
    hidden_prefix: H_s, states that alignment compares.
    align_target: P_t, from the target image; None without its features.
    restored: U_k(F_c) of the condition image, None without a restorer.
  """

  logits: Float[Array, 'B N V'] | None
  targets: Int[Array, 'B N']
  predictors: Float[Array, 'B N D']
  hidden: Float[Array, 'B L D']
  hidden_prefix: Float[Array, 'B P D'] | None
  align_target: Float[Array, 'B P D'] | None
  restored: Float[Array, 'B h w d'] | None


class _Set0(NamedTuple):
  x: Float[Array, 'B L D']
  valid: Bool[Array, 'B L'] | None  # None: no key is hidden
  restored: Float[Array, 'B h w d'] | None
  vector: Float[Array, 'B D'] | None  # condition of the adaln blocks
  own: Float[Array, 'B D'] | None  # that of set 0, if another one
  memory: Any = None  # of the injector, in place of a prefix


class Scar(nn.Module):
  """Semantic-context autoregressive model."""

  cfg: ScarConfig

  def setup(self):
    cfg = self.cfg
    D = cfg.decoder.width
    self.layout = cfg.make_layout()
    self.order = cfg.make_order()
    self.decoder = SetDecoder(cfg.decoder, name='decoder')
    if cfg.prefix.compress != 'off':
      self.prefix = Compressor(cfg.prefix, name='prefix')
    if cfg.prefix.inject != 'prefill':
      self.inject = Injector(cfg.decoder, cfg.prefix, self.order, name='inject')
    if cfg.has_null_prefix:
      init = annotated(nn.initializers.normal(D**-0.5), None, 'embed')
      shape = (cfg.prefix.length, D)
      self.null_prefix = self.param('null_prefix', init, shape)
    if self._scales:
      classes = cfg.text.classes if cfg.text.kind == 'label' else 0
      self.scale = ScaleInputs(
        self.order,
        D,
        classes,
        cfg.prefix.out_grid,
        cfg.text_len,
        cfg.places,
        name='scale',
      )
    if cfg.text_len:
      self.text = TextEmbedder(cfg.text, D, name='text')
    if cfg.order == 'random':
      init = annotated(nn.initializers.normal(0.02), 'embed')
      self.query = self.param('query', init, (D,))
    self.dropout = nn.Dropout(cfg.token_dropout)

  def _batch(self, cond: Conditions) -> int:
    return jax.tree.leaves(cond)[0].shape[0]

  def _prefix(self, cond: Conditions) -> tuple[jax.Array, jax.Array | None]:
    cfg = self.cfg.prefix
    if cfg.from_tokens:
      source = self.decoder.embed(given(cond, 'source_tokens'))
      source = source.reshape(source.shape[0], *cfg.grid, cfg.width)
    else:
      # The encoder is frozen: nothing flows back into it.
      source = jax.lax.stop_gradient(given(cond, 'features'))
    compressed = self.prefix.compress(source)
    restored = self.prefix.restore(compressed) if cfg.restores else None
    x = self.prefix.project(compressed)
    if cond.null_prefix is None:
      return x, restored
    if not self.cfg.has_null_prefix:
      raise ValueError(
        'null prefixes asked from a model without one; accepted: a model '
        "trained with --config.model.cond_dropout=joint, or guidance on 'text'"
      )
    null = jnp.asarray(self.null_prefix)
    if cfg.null == 'fixed':
      null = jax.lax.stop_gradient(null)
    return jnp.where(cond.null_prefix[:, None, None], null, x), restored

  def set0(self, cond: Conditions, deterministic: bool = True) -> _Set0:
    """Embeddings of prefix and text, and which of their keys are hidden."""
    cfg = self.cfg
    batch, null = self._batch(cond), self._null_text(cond)
    parts, text, valid, restored, vector, own, memory = [], *(None,) * 6
    if cfg.prefix.compress != 'off':
      prefix, restored = self._prefix(cond)
      prefix = self.scale.prefix(prefix) if self._scales else prefix
      if cfg.prefix.inject == 'prefill':
        parts.append(prefix)
      else:
        memory = self.inject(prefix)
    if cfg.text_len:
      if cfg.text.kind == 'label':
        text = self.text.label(given(cond, 'label'), null)
      else:
        text, seen = self.text.text(
          given(cond, 'text'), given(cond, 'text_mask'), null
        )
        if cfg.text.mask_pad:
          ones = jnp.ones((batch, cfg.prefix.positions), bool)
          valid = jnp.concatenate([ones, seen], axis=1)
      x = self.scale.text(text) if self._scales else text
      parts.append(self.dropout(x, deterministic=deterministic))
    if self._scales:
      label = given(cond, 'label') if cfg.text.kind == 'label' else None
      vector = self.scale.condition(null, label, text, cond.text_mask)
      if cfg.prefix_ada == 'null':
        own = self.scale.condition(jnp.ones_like(null))
    if not parts:
      parts.append(jnp.zeros((batch, 0, cfg.decoder.width)))
    x = jnp.concatenate(parts, axis=1)
    return _Set0(x, valid, restored, vector, own, memory)

  @property
  def _scales(self) -> bool:
    return self.cfg.order == 'scale'

  def _null_text(self, cond: Conditions) -> Bool[Array, ' B']:
    null = cond.null_text
    return jnp.zeros(self._batch(cond), bool) if null is None else null

  def _rope(self, positions, zero=None):
    cfg = self.cfg.decoder
    if self._scales and self.cfg.places != 'rotary':
      return None
    return rope_table(positions, cfg.head_dim, cfg.rope_base, zero)

  def _embed(self, inputs: Inputs, rope, vector) -> Float[Array, 'B M D']:
    """Embeds target inputs by kind; `rope` is that of the same positions."""
    if self._scales:
      return self.scale(inputs, vector)
    kinds = jnp.asarray(inputs.kind)
    x = self.decoder.embed(jnp.maximum(inputs.tokens, 0))
    if QUERY in inputs.kind:
      # RandAR: one shared vector, made position-specific by rotation.
      shape = (*x.shape[:2], self.cfg.decoder.heads, self.cfg.decoder.head_dim)
      query = jnp.broadcast_to(self.query, x.shape).reshape(shape)
      query = apply_rope(query, rope).reshape(x.shape)
      x = jnp.where((kinds == CONTENT)[:, None], x, query.astype(x.dtype))
    return x

  def __call__(
    self,
    tokens: Int[Array, 'B N'],
    cond: Conditions,
    target_features: Float[Array, 'B h w d'] | None = None,
    draws: Float[Array, ' B'] | None = None,
    perm: Int[Array, 'B N'] | None = None,
    choice: Int[Array, ''] | None = None,
    deterministic: bool = True,
    accumulate: Accumulate | None = None,
    seen: Int[Array, 'B N'] | None = None,
    with_logits: bool = True,
  ) -> ScarOutput:
    """A teacher-forced pass.

    Args:
      tokens: target tokens, row-major; of all scales in the scale order.
      cond: conditions.
      target_features: encoder features of the target image, for alignment.
      draws: uniform numbers of the condition dropout; drawn from the rng
        'condition' in training if absent, no dropout otherwise.
      perm: permutations of the random order; drawn from 'order' if absent.
      choice: which of `train_sets` cuts them; drawn likewise.
      deterministic: no dropout of any kind (other than by `draws`).
      accumulate: of the multi-scale tokenizer, for the scale order.
      seen: tokens that the inputs are made of, in place of `tokens`.
      with_logits: False leaves the head to the loss.
    """
    cfg, layout = self.cfg, self.layout
    batch = tokens.shape[0]
    if draws is None and not deterministic:
      draws = jax.random.uniform(self.make_rng('condition'), (batch,))
    if draws is not None:
      cond = dropped(cond, draws, cfg)
    if perm is None and cfg.order == 'random':
      keys = jax.random.split(self.make_rng('order'), batch)
      perm = self.order.draw(keys)
    set0 = self.set0(cond, deterministic)
    if seen is None:
      seen = tokens if deterministic else self._noisy(tokens)
    inputs = self._train_inputs(seen, perm, accumulate, choice)
    target_pos = layout.target_positions(inputs)
    # Places that do not depend on the batch make a table of constants.
    xp: Any = np if isinstance(target_pos, np.ndarray) else jnp
    lead = target_pos.shape[:-2]  # of one permutation per sample
    pos0 = xp.broadcast_to(layout.positions, (*lead, layout.set0_len, 2))
    positions = xp.concatenate([pos0, target_pos], axis=-2)
    zero = np.pad(layout.zero_rope, (0, layout.target_len))
    rope = self._rope(positions, zero)
    vector, early = set0.vector, None
    x = self._embed(
      inputs, jax.tree.map(lambda t: t[..., layout.set0_len :, :], rope), vector
    )
    if cfg.token_dropout_scope == 'all':
      x = self.dropout(x, deterministic=deterministic)
    x = jnp.concatenate([set0.x, x.astype(set0.x.dtype)], axis=1)
    valid = set0.valid
    if valid is not None:
      pad = ((0, 0), (0, layout.target_len))
      valid = jnp.pad(valid, pad, constant_values=True)
    x = constrain(x, 'batch', 'length', 'act_embed')
    if set0.own is not None:
      vector = jnp.stack([set0.own, vector], axis=1)
      early = jnp.arange(layout.length) < layout.set0_len
    set_ids = layout.set_ids
    if cfg.train_sets:  # drawn, so no longer known to a kernel
      set_ids = jnp.asarray(set_ids).at[layout.set0_len :].set(inputs.set_ids)
    pre_norm, _ = self.decoder.blocks(
      x,
      rope,
      set_ids,
      key_valid=valid,
      cond=vector,
      early=early,
      deterministic=deterministic,
      padding=(layout.prefix_len, layout.set0_len),
      inject=self._injected(set0.memory, slice(None), inputs),
    )
    hidden = self.decoder.final_norm(pre_norm, vector, early)
    predictors = layout.predictors(hidden)
    return ScarOutput(
      logits=self.decoder.logits(predictors) if with_logits else None,
      predictors=predictors,
      targets=self.order.targets(tokens, perm),
      hidden=hidden,
      restored=set0.restored,
      **self._alignment(hidden, pre_norm, target_features),
    )

  def _train_inputs(self, tokens, perm, accumulate, choice) -> Inputs:
    order: Any = self.order
    sets = self.cfg.train_sets
    if not sets:
      return order.train_inputs(tokens, perm, accumulate)
    if choice is None:
      choice = jax.random.randint(self.make_rng('order'), (), 0, len(sets))
    return order.train_inputs(tokens, perm, accumulate, choice)

  def _noisy(self, tokens: Int[Array, 'B N']) -> Int[Array, 'B N']:
    """The inputs of training, see `token_noise`.

    In the scale order noise changes the targets: the tokenizer makes both
    (`seen`).
    """
    cfg = self.cfg
    if self._scales or not (cfg.token_noise or cfg.context_dropout):
      return tokens
    key = self.make_rng('dropout')
    return exchanged(tokens, key, cfg.token_noise, cfg.context_dropout)

  def _injected(
    self, memory: Any, some: slice, inputs: Inputs | None = None
  ) -> Injection | None:
    """The condition for some positions of set 0 and for target inputs."""
    if memory is None:
      return None
    read = read_by(self.order, self.layout.set0_len, some, inputs)
    return self.inject.at(memory, read)

  def _alignment(self, hidden, pre_norm, target_features):
    """H_s and P_t; the same compressor and projection make both prefixes."""
    cfg = self.cfg
    if not cfg.aligns:
      return {'hidden_prefix': None, 'align_target': None}
    states = hidden if cfg.align_hidden == 'post_norm' else pre_norm
    states, target = states[:, : self.layout.prefix_len], None
    if target_features is not None:
      features = jax.lax.stop_gradient(target_features)
      target = self.prefix.project(self.prefix.compress(features))
    if cfg.align_hidden == 'pre_norm':
      states = layer_norm(states, 1e-6)
      target = None if target is None else layer_norm(target, 1e-6)
    return {'hidden_prefix': states, 'align_target': target}

  def prefill(
    self, cond: Conditions, cache_size: int, branches: int = 1
  ) -> tuple[Float[Array, 'B 1 V'] | None, KVCache, Modulation | None]:
    """Set 0 into a new cache; logits of its last position; the condition.

    VAR without a prefix has no set 0, and no logits yet.

    Args:
      cond: conditions, all guidance branches stacked along the batch.
      cache_size: slots, at least `layout.length`.
      branches: that many equal parts of the batch agree in the first
        `ScarConfig.shared_len` positions, which are then computed once.
    """
    layout, set0 = self.layout, self.set0(cond)
    vector = set0.vector
    steered = None if vector is None else self.decoder.modulate(vector)
    rows = set0.x.shape[0] // branches
    cache = make_cache(self.cfg.decoder, rows, cache_size).replace(used=0)
    if not layout.set0_len:
      cache = repeat_rows(cache, branches).replace(memory=set0.memory)
      return None, cache, steered
    own = steered if set0.own is None else self.decoder.modulate(set0.own)
    cut = self.cfg.shared_len if branches > 1 else layout.set0_len
    first, ada = jax.tree.map(lambda t: t[:rows], (set0, own))
    hidden, cache = self._fill(first, ada, cache, slice(0, cut))
    cache = repeat_rows(cache, branches)
    if cut < layout.set0_len:
      rest = slice(cut, layout.set0_len)
      hidden, cache = self._fill(set0, own, cache, rest)
    cache = cache.replace(memory=set0.memory)
    return self.decoder.logits(hidden[:, -1:]), cache, steered

  def _fill(
    self, set0: _Set0, cond: Modulation | None, cache: KVCache, some: slice
  ) -> tuple[Float[Array, 'B n D'], KVCache]:
    """Hidden states of some positions of set 0, and the cache with them."""
    layout = self.layout
    return self.decoder(
      set0.x[:, some],
      self._rope(layout.positions[some], layout.zero_rope[some]),
      jnp.asarray(layout.set_ids[some]),
      cache=cache,
      key_valid=None if set0.valid is None else set0.valid[:, some],
      cond=cond,
      inject=self._injected(set0.memory, some),
    )

  def decode(
    self,
    inputs: Inputs,
    cache: KVCache,
    steered: Modulation | None = None,
    last: int = 0,
    key_valid: Bool[Array, 'B M'] | None = None,
  ) -> tuple[Float[Array, 'B n V'], KVCache]:
    """One sampling step: logits of its last inputs.

    Args:
      inputs: of the step.
      cache: of all steps before.
      steered: that of `prefill`, which the adaln blocks read in every step.
      last: how many inputs, from the end, predict; 0 is all.
      key_valid: False at inputs that no other may see.
    """
    rope = self._rope(self.layout.target_positions(inputs))
    x = self._embed(inputs, rope, None if steered is None else steered.vector)
    hidden, cache = self.decoder(
      x,
      rope,
      inputs.set_ids,
      cache,
      key_valid,
      cond=steered,
      inject=self._injected(cache.memory, slice(0), inputs),
    )
    return self.decoder.logits(hidden[:, -last:]), cache
