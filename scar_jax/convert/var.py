"""Names of VAR's transformer checkpoints and where each tensor goes, both ways.

In: a torch state dict as numpy arrays (`var_d16` ... `var_d36`). Out: the
`params` tree of a `Scar` in the scale order without a prefix, or its config
from the tensors alone. The names are those of FoundationVision/VAR `VAR`;
method 11.5 is the table.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert.common import Entry, assemble, disassemble, linear
from scar_jax.convert.gpt_sizes import artifact, model_of, size
from scar_jax.convert.sizes import heads_of_64, layers_of, shape_of
from scar_jax.filters import SamplerConfig
from scar_jax.models.conditions import empty_conditions
from scar_jax.models.decoder import DecoderConfig, decoder_size
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.text_embedder import TextCondition
from scar_jax.orders.scale import PATCH_NUMS, blank
from scar_jax.parts import EditorConfig, TextSetup
from scar_jax.types import PyTree

__all__ = [
  'abstract_params', 'artifact', 'buffers', 'convert', 'detect', 'model_config',
  'reverse', 'size', 'table',
]  # fmt: skip

_DOWNSAMPLE = 16  # pixels per token and side, of the tokenizer they go with
# Constants of the reference: scale of each position, the mask, a zero key bias.
SKIP = (r'lvl_1L', r'attn_bias_for_masking', r'blocks\.\d+\.attn\.zero_k_bias')


def decoder_table(cfg: DecoderConfig, root: str = '') -> list[Entry]:
  """Rows of the transformer; `root` is put before our paths (`decoder/`)."""
  layer, ours = 'blocks.{i}', f'{root}layers'
  entries = [
    *linear(f'{root}head', 'head'),
    *linear(f'{root}head_ada', 'head_nm.ada_lin.1'),
    *linear(f'{ours}/attn/qkv', f'{layer}.attn.mat_qkv', bias=False),
    *linear(f'{ours}/attn/out', f'{layer}.attn.proj', in_dims=2),
    Entry(f'{ours}/attn/q_bias', (f'{layer}.attn.q_bias',), 'flat'),
    Entry(f'{ours}/attn/v_bias', (f'{layer}.attn.v_bias',), 'flat'),
    *linear(f'{ours}/ffn/fc1', f'{layer}.ffn.fc1'),
    *linear(f'{ours}/ffn/fc2', f'{layer}.ffn.fc2'),
  ]
  if cfg.qk_norm:
    source = f'{layer}.attn.scale_mul_1H11'
    entries.append(Entry(f'{ours}/attn/log_scale', (source,), lead=1, tail=2))
  if cfg.shared_ada:
    entries += linear(f'{root}shared_ada', 'shared_ada_lin.1')
    entries.append(Entry(f'{ours}/ada_bias', (f'{layer}.ada_gss',), lead=2))
  else:
    entries += linear(f'{ours}/ada', f'{layer}.ada_lin.1')
  return entries


def table(cfg: ScarConfig) -> list[Entry]:
  """One row for each parameter of `Scar(cfg)`.

  Raises:
    ValueError: another order, or a prefix, which no public checkpoint has.
  """
  _check_plain(cfg)
  return [
    *decoder_table(cfg.decoder, 'decoder/'),
    Entry('scale/label', ('class_emb.weight',)),
    Entry('scale/start', ('pos_start',), lead=1),
    Entry('scale/place', ('pos_1LC',), lead=1),
    Entry('scale/level', ('lvl_embed.weight',)),
    *linear('scale/word', 'word_embed'),
  ]


def _check_plain(cfg: ScarConfig) -> None:
  given = (cfg.order, cfg.prefix.compress, cfg.text.kind)
  if given != ('scale', 'off', 'label'):
    raise ValueError(
      f'order={given[0]!r}, prefix.compress={given[1]!r}, text.kind='
      f"{given[2]!r} has no counterpart in VAR; accepted: 'scale', 'off', "
      "'label' (set --config.order.name, prefix.compress and text.kind)"
    )


@functools.lru_cache(maxsize=8)  # tracing the model takes its time
def abstract_params(cfg: ScarConfig) -> PyTree:
  """Shapes of `Scar(cfg)`'s parameters, without making any."""

  def init() -> PyTree:
    return Scar(cfg).init(
      jax.random.key(0),
      jnp.zeros((1, cfg.make_order().num_targets), jnp.int32),
      empty_conditions(cfg, 1),
      accumulate=blank(cfg.patch_nums, cfg.latent_dim),
    )

  return jax.eval_shape(init)['params']


def convert(
  cfg: ScarConfig | EditorConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The `params` of `Scar(cfg)`.

  Args:
    cfg: of the checkpoint, see `detect`.
    state: torch tensors.

  Raises:
    ValueError: lists missing, unexpected and wrongly shaped tensors.
  """
  cfg = model_of(cfg)
  return assemble(table(cfg), state, abstract_params(cfg), SKIP)


def buffers(cfg: ScarConfig | EditorConfig) -> dict[str, np.ndarray]:
  """Tensors without weights that the reference's strict loading asks for."""
  cfg = model_of(cfg)
  level = cfg.make_order().set_ids - 1
  mask = np.where(level[:, None] >= level, 0, -np.inf).astype(np.float32)
  zero = np.zeros(cfg.decoder.width, np.float32)
  return {
    'lvl_1L': level[None].astype(np.int64),
    'attn_bias_for_masking': mask[None, None],
    **{f'blocks.{i}.attn.zero_k_bias': zero for i in range(cfg.decoder.layers)},
  }


def reverse(cfg: ScarConfig | EditorConfig, params: PyTree) -> dict[str, Any]:
  """The tensors of an artifact, under the reference's names.

  Raises:
    ValueError: a model that is not VAR's.
  """
  return disassemble(table(model_of(cfg)), params)


def model_config(
  decoder: DecoderConfig,
  patch_nums: Sequence[int],
  classes: int = 1000,
  latent_dim: int = 32,
) -> ScarConfig:
  """VAR: the scale order, a class, no prefix."""
  side = patch_nums[-1]
  return ScarConfig(
    decoder=decoder,
    prefix=PrefixConfig('off', out=decoder.width),
    text=TextCondition('label', classes=classes),
    order='scale',
    grid=(side, side),
    patch_nums=tuple(patch_nums),
    latent_dim=latent_dim,
  )


def _sides(scales: int, positions: int) -> tuple[int, ...]:
  """Sides of so many scales with so many positions in all."""
  known = (*PATCH_NUMS.values(), tuple(range(1, scales + 1)))
  for sides in known:
    if len(sides) == scales and sum(p * p for p in sides) == positions:
      return sides
  raise ValueError(
    f'{scales} scales of {positions} positions are no published schedule; '
    f'accepted: their sides (set --patch_nums)'
  )


def detect(
  state: Mapping[str, Any],
  heads: int | None = None,
  patch_nums: Sequence[int] | None = None,
  tokenizer: str = '',
) -> EditorConfig:
  """The model that a checkpoint holds, from shapes alone.

  Args:
    state: torch tensors or their shapes.
    heads: needed only without q, k normalisation, where no tensor shows them;
      64 channels each by default.
    patch_nums: sides of the scales, for an unpublished schedule.
    tokenizer: artifact to record.

  Raises:
    ValueError: tensors that the sizes are read from are missing, or the heads
      or the scales are no published ones and not given.
  """
  shapes = getattr(state, 'shapes', state)
  vocab, width = shape_of(shapes, 'head.weight')
  layers = layers_of('blocks.', shapes)
  log_scale = 'blocks.0.attn.scale_mul_1H11'
  if log_scale in shapes:
    heads = shape_of(shapes, log_scale)[1]
  elif heads is None:
    heads = heads_of_64(width)
  hidden = shape_of(shapes, 'blocks.0.ffn.fc1.weight')[0]
  shared = 'shared_ada_lin.1.weight' in shapes
  base, gate = decoder_size('d36' if shared else 'd16'), {24: 1e-4, 30: 1e-5}
  decoder = dataclasses.replace(
    base,
    width=width,
    layers=layers,
    heads=heads,
    vocab=vocab,
    mlp_hidden=0 if hidden == 4 * width else hidden,
    qk_norm=log_scale in shapes,
    ada_gate=gate.get(layers, base.ada_gate),
    drop_path=0.1 * layers / 24,
  )
  if patch_nums is None:
    scales = shape_of(shapes, 'lvl_embed.weight')[0]
    patch_nums = _sides(scales, math.prod(shape_of(shapes, 'pos_1LC')[:2]))
  model = model_config(
    decoder,
    patch_nums,
    classes=shape_of(shapes, 'class_emb.weight')[0] - 1,
    latent_dim=shape_of(shapes, 'word_embed.weight')[1],
  )
  return EditorConfig(
    model=model,
    # The settings of VAR's published scores; its cfg 1.5 is our 2.5.
    sample=SamplerConfig(
      top_k=900, top_p=0.96, rule='var', guidance=2.5, ramp='sets'
    ),
    text=TextSetup('label', 1),
    image_size=patch_nums[-1] * _DOWNSAMPLE,
    tokenizer=tokenizer,
  )
