"""LlamaGen beside ours: training and cached sampling of the GPT, and VQ-16.

In: a checkout of FoundationVision/LlamaGen. Out: a `Pair` for each work of
`reference.py`. Sampling is their `generate` with guidance, top-k 1 and the
draw; the GPT predicts tokens, which are not decoded.
"""

import functools
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
  forward_pair,
  gap,
  no_grad,
  on_device,
  same,
  shaken,
  tensors,
  to_numpy,
  to_torch,
  to_train,
  training_pair,
)
from scar_jax.config import LossConfig
from scar_jax.convert import editar, gpt_sizes, llamagen_vq
from scar_jax.convert.parity_vq import nhwc
from scar_jax.extras import require
from scar_jax.filters import SamplerConfig
from scar_jax.models.conditions import Conditions
from scar_jax.models.convolutions import each_picture
from scar_jax.models.scar import Scar
from scar_jax.models.tokenizers.vq import VQConfig, VQModel
from scar_jax.parts import EditorConfig
from scar_jax.precision import smaller, with_dtype
from scar_jax.sampling import Sampler
from scar_jax.train.tasks.scar import ScarTask

_GPT = 'autoregressive.models.gpt'
_GENERATE = 'autoregressive.models.generate'
_VQ = 'tokenizer.tokenizer_image.vq_model'
MODULES = (_GPT, _GENERATE, _VQ)
_PIXELS = 16  # per token and side
_CLASSES = 1000
_DROPOUT = 0.1  # of their training script
_SAMPLER = SamplerConfig(top_k=1, guidance=4.0)


def _gpt(
  checkout: Checkout, size: str, setting: Setting, dropout: bool
) -> tuple[Any, EditorConfig, Any]:
  """The reference, the config that fits it, and its weights as ours."""
  rate = _DROPOUT if dropout else 0.0
  model = checkout.load(_GPT).GPT_models[f'GPT-{size}'](
    block_size=setting.grid**2,
    num_classes=_CLASSES,
    token_dropout_p=rate,
    resid_dropout_p=rate,
    ffn_dropout_p=rate,
  )
  # After it has made a row for the null class.
  model.cls_embedding.dropout_prob = rate
  weights = tensors(shaken(model))
  found = gpt_sizes.detect_editor(
    weights, 'llamagen', image_size=_PIXELS * setting.grid
  )
  params = on_device(editar.convert(found, weights))
  return model, with_dtype(found, setting.dtype), params


def _inputs(setting: Setting, vocab: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocab, (setting.batch, setting.grid**2), np.int32)
  return rng.integers(0, _CLASSES, setting.batch, np.int32), tokens


def train(checkout: Checkout, size: str, setting: Setting) -> Pair:
  """A training step, class-conditional."""
  model, found, params = _gpt(checkout, size, setting, setting.dropout)
  cfg = to_train(found.model, setting)
  label, tokens = _inputs(setting, cfg.decoder.vocab)
  # The tokens are given: no tokenizer runs on either side.
  tokenizer = Artifact('tokenizer', VQConfig(), {}, 'none', {}, '')
  task = ScarTask(EditorConfig(cfg), {'tokenizer': tokenizer}, LossConfig())
  given, wanted = to_torch(label), to_torch(tokens)

  def loss(model: Any) -> Any:
    return model(cond_idx=given, idx=wanted[:, :-1], targets=wanted)[1]

  batch = {'label': jnp.asarray(label), 'tokens': jnp.asarray(tokens)}
  return training_pair(task, params, batch, model.train(), loss, setting)


def sample_int8(checkout: Checkout, size: str, setting: Setting) -> Pair:
  """`sample` with our weights in int8; theirs have no such choice."""
  return sample(checkout, size, setting, 'int8')


def sample(
  checkout: Checkout, size: str, setting: Setting, weights: str = ''
) -> Pair:
  """All tokens of an image through the cache, with guidance."""
  torch = require('torch', 'bench')
  model, found, params = _gpt(checkout, size, setting, dropout=False)
  model.eval()
  if setting.narrow:
    model.to(torch.bfloat16)  # as their scripts sample
  params = smaller(found.model, params, weights)
  label, _ = _inputs(setting, found.model.decoder.vocab)
  make: Any = Conditions
  run: Any = functools.partial(
    Sampler(Scar(found.model), _SAMPLER).run,
    {'params': params},
    make(label=jnp.asarray(label)),
    jnp.arange(setting.batch),
  )
  theirs = functools.partial(
    no_grad,
    checkout.load(_GENERATE).generate,
    cond=to_torch(label),
    max_new_tokens=setting.grid**2,
    cfg_scale=_SAMPLER.guidance,
    top_k=_SAMPLER.top_k,
  )

  def differ() -> tuple[float, str]:
    # Along their tokens, so that one near tie does not change all that follow.
    seen: list[np.ndarray] = []
    hook = model.output.register_forward_hook(
      lambda module, given, logits: seen.append(to_numpy(logits).copy())
    )
    tokens = theirs(model).numpy()
    hook.remove()
    out = run(forced=jnp.asarray(tokens), trace=True)
    raw = np.asarray(out.raw)
    want = np.concatenate(seen, axis=1).reshape(raw.shape)
    told = same(run().tokens, tokens, 'tokens')
    return gap(raw, want), f'logits; {told}'

  compiled = None
  if setting.compile:
    compiled = functools.partial(theirs, torch.compile(model))
  return Pair(run, functools.partial(theirs, model), differ, compiled)


def _vq(checkout: Checkout, size: str) -> tuple[Any, VQModel, Any]:
  model = checkout.load(_VQ).VQ_models[size]()
  weights = tensors(shaken(model.eval()))
  cfg = llamagen_vq.detect(weights)
  variables = {'params': on_device(llamagen_vq.convert(cfg, weights))}
  return model, VQModel(cfg), variables


def _jitted(model: VQModel, method: str, pixels: int) -> Any:
  """As the editor runs it: on CPUs large pictures one by one."""

  def run(variables: Any, x: Any) -> Any:
    network = functools.partial(model.apply, variables, method=method)
    return each_picture(network, x, pixels)

  return jax.jit(run, compiler_options=compiler.options())


def encode(checkout: Checkout, size: str, setting: Setting) -> Pair:
  """Images to codes."""
  model, ours, variables = _vq(checkout, size)
  side = _PIXELS * setting.grid
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (setting.batch, 3, side, side))
  images = images.astype(np.float32)
  apply = _jitted(ours, 'encode', side**2)
  run = functools.partial(apply, variables, jnp.asarray(nhwc(images)))
  given = to_torch(images)

  def differ() -> tuple[float, str]:
    seen = []
    hook = model.quant_conv.register_forward_hook(
      lambda module, given, raw: seen.append(nhwc(raw.numpy()))
    )
    ids = no_grad(model.encode, given)[2][2].numpy()
    hook.remove()
    (raw,) = seen
    (found, latent) = run()
    want = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    told = same(np.ravel(found), ids, 'codes')
    return gap(latent, want), f'latents; {told}'

  return forward_pair(run, model.encode, (given,), differ, setting)


def decode(checkout: Checkout, size: str, setting: Setting) -> Pair:
  """Codes to images."""
  model, ours, variables = _vq(checkout, size)
  _, tokens = _inputs(setting, ours.cfg.codes)
  grid = (setting.batch, setting.grid, setting.grid)
  apply = _jitted(ours, 'decode_tokens', (_PIXELS * setting.grid) ** 2)
  run = functools.partial(apply, variables, jnp.asarray(tokens.reshape(grid)))
  shape = (setting.batch, ours.cfg.code_dim, setting.grid, setting.grid)
  args = (to_torch(tokens), shape)

  def differ() -> tuple[float, str]:
    want = no_grad(model.decode_code, *args).numpy()
    return gap(run(), nhwc(want)), 'images'

  return forward_pair(run, model.decode_code, args, differ, setting)
