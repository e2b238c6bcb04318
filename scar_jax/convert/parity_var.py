"""VAR's tokenizer and transformers against their fixtures.

In: a `Fixture` of `var_vqvae`, or of a transformer with the tokenizer's beside
it. Out: latents, ids, images, logits, greedy sampling, losses and gradients,
beside the reference's. Used by `selftest.py`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax import objectives
from scar_jax.convert import var, var_vqvae
from scar_jax.convert.common import disassemble
from scar_jax.convert.parity_vq import nhwc
from scar_jax.convert.selftest import Check, Fixture, gradient
from scar_jax.filters import SamplerConfig
from scar_jax.models.conditions import Conditions
from scar_jax.models.scar import Scar
from scar_jax.models.tokenizers.msvq import (
  MSVQModel,
  accumulator,
  straight_through,
)
from scar_jax.models.tokenizers.msvq_config import MSVQConfig
from scar_jax.sampling import generate
from scar_jax.types import PyTree

_DECODED = 2e-4  # absolute, of the fixtures' README
_GUIDED = 5e-4  # absolute: guidance multiplies the error of a logit


def outputs(fixture: Fixture) -> Iterator[Check]:
  """Every output of a fixture that the model has."""
  if fixture.name == 'var_vqvae':
    return _tokenizer(fixture)
  return _transformer(fixture)


def _load_tokenizer(fixture: Fixture) -> tuple[MSVQConfig, PyTree]:
  sides = fixture.meta['patch_nums']
  cfg = var_vqvae.detect(fixture.tensors, sides)
  return cfg, var_vqvae.convert(cfg, fixture.tensors)


@functools.lru_cache(maxsize=4)
def _passes(cfg: MSVQConfig) -> tuple[Any, Any]:
  """All passes of a model, which share their work, and decoding by itself."""
  model = MSVQModel(cfg)

  def method(name: Any, variables: Any, x: Any) -> Any:
    return model.apply(variables, x, method=name)

  def run(variables: Any, images: Any, ids: Any) -> Any:
    return (
      model.apply(variables, images),
      method(lambda m, x: m.encoder(x), variables, images),
      method('encode', variables, images),
      method('decode_tokens', variables, ids),
      method('tokens_to_inputs', variables, ids),
      method('split', variables, ids),
    )

  return jax.jit(run), jax.jit(functools.partial(method, 'decode'))


@functools.partial(jax.jit, static_argnums=1)
def _added(add: Any, k: int, latent: Any, ids: Any) -> Any:
  return add(k, latent, ids)


def _tokenizer(fixture: Fixture) -> Iterator[Check]:
  a = fixture.arrays
  cfg, params = _load_tokenizer(fixture)
  variables, scales = {'params': params}, range(len(cfg.patch_nums))
  run, decode = _passes(cfg)
  out, encoded, (ids, raw), decoded, inputs, split = run(
    variables, nhwc(a['image']), a['idx_all']
  )
  yield Check('idx_all', out.ids, a['idx_all'], exact=True)
  yield Check('idx_all of encode', ids, a['idx_all'], exact=True)
  yield Check('latent', out.raw, nhwc(a['latent']))
  yield Check('latent of encode', raw, nhwc(a['latent']))
  yield Check('enc_out', encoded, nhwc(a['enc_out']))
  for k in scales:
    yield Check(f'f_hat_{k}', out.partial[k], nhwc(a[f'f_hat_{k}']))
    yield Check(f'idx_{k}', split[k], a[f'idx_{k}'], exact=True)
  for k in scales[:-1]:
    image = np.clip(decode(variables, out.partial[k]), -1, 1)
    name = f'image_rec_scale_{k}'
    yield Check(name, image, nhwc(a[name]), 0.0, _DECODED)
  plain = nhwc(a['image_rec_unclamped'])
  yield Check('image_rec_unclamped', out.images, plain, 0.0, _DECODED)
  image = np.clip(decoded, -1, 1)
  yield Check('image_rec', image, nhwc(a['image_rec']), 0.0, _DECODED)
  yield Check('var_input', inputs, a['var_input'])
  latent, add = None, accumulator(cfg, params)
  for k in scales:
    want = nhwc(a[f'next_map_{k}'])
    latent, values = _added(add, k, latent, a[f'idx_{k}'])
    ours = latent if values is None else values.reshape(want.shape)
    yield Check(f'next_map_{k}', ours, want)
  yield from _quantiser(cfg, params, a)


@functools.lru_cache(maxsize=4)
def _gradients(cfg: MSVQConfig) -> Any:
  """Loss of the quantiser, and gradients through it."""
  model: Any = MSVQModel(cfg)

  def total(raw: Any, codebook: Any, params: PyTree, weight: Any) -> Any:
    variables = {'params': {**params, 'codebook': codebook}}
    _, partial = model.apply(variables, raw, method='quantize')
    through = straight_through(raw, partial[-1])
    loss = objectives.residual_loss(raw, partial)
    return 0.01 * jnp.sum(through * weight) + loss, (loss, through)

  return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def _quantiser(cfg: MSVQConfig, params: PyTree, a: Any) -> Iterator[Check]:
  (_, (loss, through)), grads = _gradients(cfg)(
    nhwc(a['latent']),
    jnp.asarray(params['codebook']),
    params,
    nhwc(a['st_weight']),
  )
  yield Check('train_vq_loss', loss, a['train_vq_loss'], atol=0.0)
  yield Check('train_f_hat', through, nhwc(a['train_f_hat']))
  yield gradient('latent', grads[0], nhwc(a['train_grad_latent']))
  yield gradient('codebook', grads[1], a['train_grad_codebook'])


def _transformer(fixture: Fixture) -> Iterator[Check]:
  a, meta = fixture.arrays, fixture.meta
  cfg = var.detect(fixture.tensors, meta['num_heads'], meta['patch_nums']).model
  params = var.convert(cfg, fixture.tensors)
  tokenizer = _load_tokenizer(fixture.parts['vae'])
  add, model = accumulator(*tokenizer), Scar(cfg)
  label = jnp.asarray(a['labels'])
  cond = Conditions(label=label)

  def loss(params: PyTree, cond: Conditions) -> Any:
    out, state = model.apply(
      {'params': params},
      a['targets'],
      cond,
      accumulate=add,
      mutable=['intermediates'],
    )
    value, _ = objectives.cross_entropy(out.logits, out.targets)
    return value, (out.logits, state['intermediates'])

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, (logits, state)), grads = run(params, cond)
  yield Check('logits', logits, a['logits'])
  blocks = state['decoder']['layers']['block'][0]
  for i, block in enumerate(blocks):
    yield Check(f'hidden_block{i}', block, a[f'hidden_block{i}'])
  yield Check('loss', value, a['loss'], atol=0.0)
  null = cond.replace(label=jnp.full_like(label, cfg.text.classes))
  (_, (logits, _)), _ = run(params, null)
  yield Check('logits_null', logits, a['logits_null'])
  inputs = jax.jit(
    lambda ids: MSVQModel(tokenizer[0]).apply(
      {'params': tokenizer[1]}, ids, method='tokens_to_inputs'
    )
  )(a['targets'])
  yield Check('x_BLCv_wo_first_l', inputs, a['x_BLCv_wo_first_l'])
  for name, grad in disassemble(var.table(cfg), grads).items():
    if name in fixture.grads:
      yield gradient(name, grad, fixture.grads[name])
    norm = np.asarray(meta['grad_l2'][name])
    yield gradient(f'{name} norm', np.linalg.norm(grad), norm)
  yield from _sampling(model, params, tokenizer, cond, a)


def _sampling(
  model: Scar,
  params: PyTree,
  tokenizer: tuple[MSVQConfig, PyTree],
  cond: Conditions,
  a: Any,
) -> Iterator[Check]:
  """Greedy images through the cache; VAR's cfg t is a scale of 1 + t."""
  decoder: Any = MSVQModel(tokenizer[0])

  @jax.jit
  def sample(params: PyTree, frozen: PyTree, strength: Any) -> Any:
    out = generate(
      model,
      {'params': params},
      cond,
      jnp.arange(len(a['labels']), dtype=jnp.uint32),
      jnp.stack([1 + strength, 1.0, 1.0]),
      SamplerConfig(temperature=0.0, ramp='sets'),
      trace=True,
      accumulate=accumulator(tokenizer[0], frozen),
    )
    image = decoder.apply(
      {'params': frozen}, out.tokens, method='decode_tokens'
    )
    return out.tokens, out.guided, (jnp.clip(image, -1, 1) + 1) / 2

  for strength, suffix in ((1.5, ''), (4.0, '_cfg4')):
    tokens, guided, image = sample(params, tokenizer[1], strength)
    name = f'gen_ids{suffix}'
    yield Check(name, tokens, a[name], exact=True)
    name = f'gen_logits{suffix}'
    yield Check(name, guided, a[name], atol=_GUIDED)
    name = f'gen_image{suffix}'
    yield Check(name, image, nhwc(a[name]), 0.0, _DECODED)
