"""VAR beside ours: training and sampling.

In: a checkout of FoundationVision/VAR. Out: a `Pair` for each work of
`reference.py`. Sampling is their `autoregressive_infer_cfg` with top-k 1, from
a class to an image; training starts from the tokens of all scales.
"""

import contextlib
import dataclasses
import functools
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax import compiler
from scar_jax.artifacts import Artifact
from scar_jax.bench.torch_side import (
  Checkout,
  Pair,
  Setting,
  gap,
  in_dtype,
  no_grad,
  on_device,
  shaken,
  tensors,
  to_numpy,
  to_torch,
  to_train,
  training_pair,
)
from scar_jax.config import LossConfig
from scar_jax.convert import var, var_vqvae
from scar_jax.convert.parity_vq import nhwc
from scar_jax.extras import require
from scar_jax.models.conditions import Conditions
from scar_jax.models.scar import Scar
from scar_jax.orders.scale import scale_sides
from scar_jax.parts import EditorConfig, Parts
from scar_jax.precision import smaller, with_dtype
from scar_jax.sampling import generate
from scar_jax.sampling_steps import split_scales
from scar_jax.train.tasks.scar import ScarTask

_VAR, _VQVAE = 'models.var', 'models.vqvae'
MODULES = (_VAR, _VQVAE)
_CLASSES = 1000
_CODES, _CODE_DIM, _CHANNELS, _PHIS = 4096, 32, 160, 4
_GUIDANCE = 1.5  # of their demo; ours is one more


@dataclasses.dataclass(frozen=True)
class _Both:
  """A model and its tokenizer, theirs and ours."""

  model: Any
  vae: Any
  editor: EditorConfig
  params: Any
  tokenizer: Artifact
  label: np.ndarray
  tokens: np.ndarray


def _load(
  checkout: Checkout, size: str, setting: Setting, dropout: bool
) -> _Both:
  depth, sides = int(size), scale_sides(setting.grid)
  # Their constructor prints its settings.
  with contextlib.redirect_stdout(io.StringIO()):
    vae = checkout.load(_VQVAE).VQVAE(
      vocab_size=_CODES,
      z_channels=_CODE_DIM,
      ch=_CHANNELS,
      share_quant_resi=_PHIS,
      v_patch_nums=sides,
    )
    model = checkout.load(_VAR).VAR(
      vae,
      num_classes=_CLASSES,
      depth=depth,
      embed_dim=64 * depth,
      num_heads=depth,
      drop_path_rate=0.1 * depth / 24 if dropout else 0.0,
      cond_drop_rate=0.1 if dropout else 0.0,
      attn_l2_norm=True,
      patch_nums=sides,
      flash_if_available=False,
      fused_if_available=False,
    )
  weights = tensors(shaken(model))
  editor = var.detect(weights, patch_nums=sides)
  editor = with_dtype(editor, setting.dtype)
  params = on_device(var.convert(editor, weights))
  weights = tensors(shaken(vae))
  cfg = var_vqvae.detect(weights, sides)
  frozen = on_device(var_vqvae.convert(cfg, weights))
  tokenizer = Artifact('tokenizer', cfg, frozen, 'none', {}, '')
  rng = np.random.default_rng(0)
  count = sum(side**2 for side in sides)
  tokens = rng.integers(0, _CODES, (setting.batch, count), np.int32)
  label = rng.integers(0, _CLASSES, setting.batch, np.int32)
  return _Both(model, vae, editor, params, tokenizer, label, tokens)


def train(checkout: Checkout, size: str, setting: Setting) -> Pair:
  """A training step of the transformer, class-conditional."""
  torch = require('torch', 'bench')
  both = _load(checkout, size, setting, setting.dropout)
  cfg = to_train(both.editor.model, setting)
  editor = dataclasses.replace(both.editor, model=cfg)
  task = ScarTask(editor, {'tokenizer': both.tokenizer}, LossConfig())
  label, tokens = to_torch(both.label), to_torch(both.tokens)
  sizes = [side**2 for side in cfg.patch_nums]

  def loss(model: Any) -> Any:
    seen = both.vae.quantize.idxBl_to_var_input(list(tokens.split(sizes, 1)))
    logits = model(label, seen)
    return torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), tokens.flatten()
    )

  batch = {'label': both.label, 'tokens': both.tokens}
  batch = {k: jnp.asarray(v) for k, v in batch.items()}
  model = both.model.train()
  return training_pair(task, both.params, batch, model, loss, setting)


def sample_int8(checkout: Checkout, size: str, setting: Setting) -> Pair:
  """`sample` with our weights in int8; theirs have no such choice."""
  return sample(checkout, size, setting, 'int8')


def sample(
  checkout: Checkout, size: str, setting: Setting, weights: str = ''
) -> Pair:
  """Images of classes, with guidance; theirs has no shapes to compile for."""
  both = _load(checkout, size, setting, dropout=False)
  model = both.model.eval()
  params = smaller(both.editor.model, both.params, weights)
  scales, cfg = split_scales(
    dataclasses.replace(
      both.editor.sample, top_k=1, top_p=0.0, guidance=1 + _GUIDANCE
    )
  )
  scar = Scar(both.editor.model)
  parts = Parts(both.editor, {'tokenizer': both.tokenizer.config})
  make: Any = Conditions

  @functools.partial(jax.jit, compiler_options=compiler.options())
  def program(params, frozen, label, seeds, scales) -> Any:
    made = generate(
      scar,
      {'params': params},
      make(label=label),
      seeds,
      scales,
      cfg,
      accumulate=parts.accumulate(frozen),
    )
    images = parts.images(frozen, made.tokens, made.latent)
    return (jnp.clip(images, -1, 1) + 1) / 2

  run = functools.partial(
    program,
    params,
    {'tokenizer': both.tokenizer.params},
    jnp.asarray(both.label),
    jnp.arange(setting.batch, dtype=jnp.uint32),
    scales,
  )
  theirs = functools.partial(
    no_grad,
    in_dtype(model.autoregressive_infer_cfg, setting),
    setting.batch,
    to_torch(both.label),
    g_seed=0,
    cfg=_GUIDANCE,
    top_k=1,
  )

  def differ() -> tuple[float, str]:
    return gap(run(), nhwc(to_numpy(theirs()))), 'images'

  return Pair(run, theirs, differ)
