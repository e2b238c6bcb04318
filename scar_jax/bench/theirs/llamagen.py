"""LlamaGen: training and cached sampling of the GPT, and VQ-16.

In: a checkout of FoundationVision/LlamaGen. Out: a `Made` for each work.
Sampling is their `generate` with guidance, top-k 1 and the draw; the GPT
predicts tokens, which are not decoded.
"""

import functools
from typing import Any

import numpy as np

from scar_jax.bench.theirs.common import (
  CLASSES,
  Checkout,
  Made,
  Setting,
  classes_and_tokens,
  compiled,
  forward,
  no_grad,
  shaken,
  tensors,
  to_numpy,
  to_torch,
  trainer,
)
from scar_jax.extras import require

_GPT = 'autoregressive.models.gpt'
_GENERATE = 'autoregressive.models.generate'
_VQ = 'tokenizer.tokenizer_image.vq_model'
MODULES = (_GPT, _GENERATE, _VQ)
PIXELS = 16  # per token and side
GUIDANCE = 4.0  # theirs and ours count it alike
_CODES, _CODE_DIM = 16384, 8
_DROPOUT = 0.1  # of their training script


def _gpt(
  checkout: Checkout, size: str, setting: Setting, dropout: bool
) -> tuple[Any, dict[str, np.ndarray]]:
  """The model, and a class and tokens for it."""
  rate = _DROPOUT if dropout else 0.0
  model = checkout.load(_GPT).GPT_models[f'GPT-{size}'](
    block_size=setting.grid**2,
    num_classes=CLASSES,
    token_dropout_p=rate,
    resid_dropout_p=rate,
    ffn_dropout_p=rate,
  )
  # After it has made a row for the null class.
  model.cls_embedding.dropout_prob = rate
  return shaken(model), classes_and_tokens(setting, _CODES, setting.grid**2)


def train(checkout: Checkout, size: str, setting: Setting) -> Made:
  """A training step, class-conditional."""
  model, inputs = _gpt(checkout, size, setting, setting.dropout)
  label, tokens = to_torch(inputs['label']), to_torch(inputs['tokens'])

  def loss(model: Any) -> Any:
    return model(cond_idx=label, idx=tokens[:, :-1], targets=tokens)[1]

  parts: Any = trainer(model.train(), loss, setting)
  return Made({'gpt': tensors(model)}, inputs, **parts)


def sample(checkout: Checkout, size: str, setting: Setting) -> Made:
  """All tokens of an image through the cache, with guidance."""
  model, inputs = _gpt(checkout, size, setting, dropout=False)
  weights = tensors(model.eval())
  if setting.narrow:
    model.to(require('torch', 'bench').bfloat16)  # as their scripts sample
  label = to_torch(inputs['label'])
  generate = no_grad(checkout.load(_GENERATE).generate)

  def use(model: Any) -> Any:
    return functools.partial(
      generate,
      model,
      cond=label,
      max_new_tokens=setting.grid**2,
      cfg_scale=GUIDANCE,
      top_k=1,
    )

  run = use(model)

  def outputs() -> dict[str, np.ndarray]:
    seen: list[np.ndarray] = []
    hook = model.output.register_forward_hook(
      lambda module, given, logits: seen.append(to_numpy(logits).copy())
    )
    tokens = to_numpy(run())
    hook.remove()
    return {'tokens': tokens, 'logits': np.concatenate(seen, axis=1)}

  return Made(
    {'gpt': weights}, inputs, run, outputs, compiled(model, use, setting)
  )


def _vq(checkout: Checkout, size: str) -> Any:
  return shaken(checkout.load(_VQ).VQ_models[size]().eval())


def encode(checkout: Checkout, size: str, setting: Setting) -> Made:
  """Images to codes."""
  model = _vq(checkout, size)
  side = PIXELS * setting.grid
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (setting.batch, 3, side, side))
  images = images.astype(np.float32)
  parts: Any = forward(model.encode, (to_torch(images),), setting)

  def outputs() -> dict[str, np.ndarray]:
    seen: list[np.ndarray] = []
    hook = model.quant_conv.register_forward_hook(
      lambda module, given, raw: seen.append(to_numpy(raw))
    )
    ids = to_numpy(parts['call']()[2][2])
    hook.remove()
    (raw,) = seen
    return {'ids': ids, 'raw': raw}

  return Made(
    {'vq': tensors(model)}, {'images': images}, **parts, outputs=outputs
  )


def decode(checkout: Checkout, size: str, setting: Setting) -> Made:
  """Codes to images."""
  model = _vq(checkout, size)
  inputs = classes_and_tokens(setting, _CODES, setting.grid**2)
  shape = (setting.batch, _CODE_DIM, setting.grid, setting.grid)
  args = (to_torch(inputs['tokens']), shape)
  parts: Any = forward(model.decode_code, args, setting)

  def outputs() -> dict[str, np.ndarray]:
    return {'images': to_numpy(parts['call']())}

  return Made({'vq': tensors(model)}, inputs, **parts, outputs=outputs)
