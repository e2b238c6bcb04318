"""VAR: training and sampling.

In: a checkout of FoundationVision/VAR. Out: a `Made` for each work. Sampling is
their `autoregressive_infer_cfg` with top-k 1, from a class to an image;
training starts from the tokens of all scales.
"""

from typing import Any

import numpy as np

from scar_jax.bench.theirs.common import (
  CLASSES,
  Checkout,
  Made,
  Setting,
  classes_and_tokens,
  in_dtype,
  no_grad,
  shaken,
  tensors,
  to_numpy,
  to_torch,
  trainer,
)
from scar_jax.extras import require

_VAR, _VQVAE = 'models.var', 'models.vqvae'
MODULES = (_VAR, _VQVAE)
GUIDANCE = 1.5  # of their demo; ours is one more
_CODES, _CODE_DIM, _CHANNELS, _PHIS = 4096, 32, 160, 4


def _load(
  checkout: Checkout, size: str, setting: Setting, dropout: bool
) -> tuple[Any, Any, dict[str, np.ndarray]]:
  """The transformer, its tokenizer, and a class and tokens for them."""
  depth, sides = int(size), setting.sides
  vae = checkout.load(_VQVAE).VQVAE(
    vocab_size=_CODES,
    z_channels=_CODE_DIM,
    ch=_CHANNELS,
    share_quant_resi=_PHIS,
    v_patch_nums=sides,
  )
  model = checkout.load(_VAR).VAR(
    vae,
    num_classes=CLASSES,
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
  inputs = classes_and_tokens(setting, _CODES, sum(p**2 for p in sides))
  return shaken(model), shaken(vae), inputs


def train(checkout: Checkout, size: str, setting: Setting) -> Made:
  """A training step of the transformer, class-conditional."""
  torch = require('torch', 'bench')
  model, vae, inputs = _load(checkout, size, setting, setting.dropout)
  label, tokens = to_torch(inputs['label']), to_torch(inputs['tokens'])
  sizes = [side**2 for side in setting.sides]

  def loss(model: Any) -> Any:
    seen = vae.quantize.idxBl_to_var_input(list(tokens.split(sizes, 1)))
    logits = model(label, seen)
    return torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), tokens.flatten()
    )

  parts: Any = trainer(model.train(), loss, setting)
  weights = {'var': tensors(model), 'vae': tensors(vae)}
  return Made(weights, inputs, **parts)


def sample(checkout: Checkout, size: str, setting: Setting) -> Made:
  """Images of classes, with guidance; it has no shapes to compile for."""
  model, vae, inputs = _load(checkout, size, setting, dropout=False)
  weights = {'var': tensors(model.eval()), 'vae': tensors(vae.eval())}
  infer = no_grad(in_dtype(model.autoregressive_infer_cfg, setting))
  label = to_torch(inputs['label'])

  def run() -> Any:
    return infer(setting.batch, label, g_seed=0, cfg=GUIDANCE, top_k=1)

  return Made(weights, inputs, run, lambda: {'images': to_numpy(run())})
