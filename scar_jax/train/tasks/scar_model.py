"""The model that a config of task 'scar' and its frozen networks describe.

In: config sections, and artifacts for the sizes of tokens and features. Out: a
`ScarConfig`. Called by `tasks/scar.py`.
"""

from collections.abc import Mapping
from typing import Any

from scar_jax.config_values import check_multiple
from scar_jax.models.decoder import decoder_size
from scar_jax.models.encoders.semantic import encoder_grid, encoder_width
from scar_jax.models.encoders.t5 import t5_config
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.text_embedder import TextCondition
from scar_jax.parts import check_tokenizer


def needed(artifacts: Mapping[str, Any], name: str) -> Any:
  """The artifact of a network that the model runs with.

  Raises:
    ValueError: it was not named.
  """
  if name not in artifacts:
    raise ValueError(
      f'{name}.artifact is empty; accepted: the directory of a trained or '
      f'converted {name} (set --config.{name}.artifact; scar plan needs only '
      f'--config.{name}.size)'
    )
  return artifacts[name]


def model_config(config: Any, artifacts: Mapping[str, Any]) -> ScarConfig:
  """The model that the sections and the frozen networks' sizes describe.

  Raises:
    ValueError: a network is missing, or fields do not go together.
  """
  model, text, prefix = config.model, config.text, config.prefix
  if prefix.inject != 'prefill' and config.loss.align:
    raise ValueError(
      f'loss.align={config.loss.align} with prefix.inject={prefix.inject!r}: '
      'alignment compares states of the prefix, and there is none; accepted: 0 '
      "(set --config.loss.align=0, or --config.prefix.inject='prefill')"
    )
  vq = needed(artifacts, 'tokenizer').config
  order = config.order.name
  check_tokenizer(order, vq)
  size = config.data.image_size
  check_multiple(
    'data.image_size', size, vq.downsample, 'the pixels of a token'
  )
  sizes = {
    name: getattr(model, name)
    for name in ('width', 'layers', 'heads')
    if getattr(model, name)
  }
  scales = {}
  if order == 'scale':
    sizes |= {'block': 'adaln', 'norm_eps': 1e-6}
    scales = {'patch_nums': vq.patch_nums, 'latent_dim': vq.code_dim}
  decoder = decoder_size(
    model.size,
    vocab=vq.codes,
    resid_dropout=model.resid_dropout,
    ffn_dropout=model.ffn_dropout,
    attn_dropout=model.attn_dropout,
    drop_path=model.drop_path,
    remat=model.remat,
    scan=model.scan,
    attention=model.attention,
    shard_length=model.shard_length,
    dtype=model.dtype,
    **sizes,
  )
  grid = (size // vq.downsample,) * 2
  if prefix.compress in ('vq', 'vq_pool', 'off'):
    source = {'grid': grid, 'width': decoder.width}
  else:
    encoder = needed(artifacts, 'encoder').config
    source = {'grid': encoder_grid(encoder), 'width': encoder_width(encoder)}
  byte = t5_config(
    'byte',
    width=text.width,
    layers=text.layers,
    heads=text.heads,
    head_dim=text.width // text.heads,
    ffn=2 * text.width,
    ngrams=text.ngrams,
    dtype=model.dtype,
  )
  t5_width = 2048
  if text.kind == 't5':
    t5_width = needed(artifacts, 'text').config.width
  return ScarConfig(
    decoder=decoder,
    prefix=PrefixConfig(
      compress=prefix.compress,
      k=prefix.k,
      out=decoder.width,
      norm=prefix.norm,
      places=prefix.places,
      null='fixed' if prefix.compress == 'vq' else 'learned',
      inject=prefix.inject,
      dtype=model.dtype,
      **source,
    ),
    text=TextCondition(
      kind=text.kind,
      length=text.length,
      width=byte.width if text.kind == 'byte' else t5_width,
      classes=text.classes,
      mask_pad=text.mask_pad,
      null=text.null,
      encoder=byte if text.kind == 'byte' else None,
      dtype=model.dtype,
    ),
    order=order,
    grid=grid,
    num_sets=config.order.num_sets,
    train_sets=config.order.train_sets,
    **scales,
    prefix_mask=prefix.mask,
    prefix_rope=prefix.rope,
    prefix_ada=prefix.ada,
    text_rope=text.rope,
    cond_dropout=model.cond_dropout,
    text_dropout=model.text_dropout,
    prefix_dropout=model.prefix_dropout,
    token_dropout=model.token_dropout,
    token_dropout_scope=model.token_dropout_scope,
    token_noise=model.token_noise,
    context_dropout=model.context_dropout,
    align_hidden=config.align.hidden,
    places=model.places,
  )
