"""LlamaGen's tokenizers against their fixtures.

In: a `Fixture` of `vq8` or `vq16`. Out: latents, ids, images, and the
quantiser's losses and gradients, beside the reference's. Used by `selftest.py`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax import objectives
from scar_jax.convert.llamagen_vq import convert, detect
from scar_jax.convert.selftest import Check, Fixture, gradient
from scar_jax.models.tokenizers.vq import VQConfig, VQModel, straight_through

_DECODED = 2e-4  # absolute, of the fixtures' README


def nhwc(x: np.ndarray) -> np.ndarray:
  """The reference's images and maps in our layout."""
  return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


@functools.lru_cache(maxsize=4)
def _passes(cfg: VQConfig) -> Any:
  """All passes of a model: one program, in which they share their work."""
  model = VQModel(cfg)

  @jax.jit
  def run(variables: Any, images: Any, ids: Any) -> Any:
    def method(name: Any, x: Any) -> Any:
      return model.apply(variables, x, method=name)

    return (
      model.apply(variables, images),
      method(lambda m, x: m.encoder(x), images),
      method('encode', images),
      method('decode_tokens', ids),
    )

  return run


def outputs(fixture: Fixture) -> Iterator[Check]:
  """Every output of a fixture that the model has."""
  a = fixture.arrays
  cfg = detect(fixture.tensors)
  variables = {'params': convert(cfg, fixture.tensors)}
  out, encoded, (ids, latent), decoded = _passes(cfg)(
    variables, nhwc(a['image']), a['indices']
  )
  yield Check('indices', out.ids, a['indices'], exact=True)
  yield Check('latent', out.raw, nhwc(a['latent']))
  yield Check('quant_entry', out.codes, nhwc(a['quant_entry']))
  yield Check('quant', out.codes, nhwc(a['quant']))
  yield Check('decoded', out.images, nhwc(a['decoded']), 0.0, _DECODED)
  yield Check('enc_out', encoded, nhwc(a['enc_out']))
  yield Check('indices of encode', ids, a['indices'], exact=True)
  unit = nhwc(a['latent'])
  unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
  yield Check('latent of encode', latent, unit)
  want = nhwc(a['decoded_from_code'])
  yield Check('decoded_from_code', decoded, want, 0.0, _DECODED)
  table = VQModel(cfg).apply(variables, method='table')
  yield Check('codebook_normed', table, a['codebook_normed'])
  yield from _training(cfg, variables['params'], a)


@functools.lru_cache(maxsize=4)
def _gradients(cfg: VQConfig) -> tuple[Any, Any]:
  """Losses of the quantiser with gradients, and gradients through it."""
  model: Any = VQModel(cfg)

  def quantised(params: Any, raw: Any) -> Any:
    ids, latent, distances = model.apply(
      {'params': params}, raw, method='quantize'
    )
    codes = model.apply({'params': params}, ids, method='lookup')
    return latent, codes, distances

  def total(raw: Any, codebook: Any, params: Any) -> Any:
    params = {**params, 'codebook': codebook}
    latent, codes, distances = quantised(params, raw)
    terms = {
      'vq': objectives.codebook_loss(latent, codes),
      'commit': objectives.commitment_loss(latent, codes),
      'entropy': 0.1 * objectives.entropy_loss(distances),
    }
    return sum(terms.values()), terms

  def weighted(raw: Any, params: Any, weight: Any) -> Any:
    unit, codes, _ = quantised(params, raw)
    return jnp.sum(straight_through(unit, codes) * weight)

  losses = jax.value_and_grad(total, (0, 1), has_aux=True)
  return jax.jit(losses), jax.jit(jax.grad(weighted))


def _training(cfg: VQConfig, params: Any, a: Any) -> Iterator[Check]:
  losses, through = _gradients(cfg)
  latent = nhwc(a['latent'])
  codebook = jnp.asarray(params['codebook'])
  (_, terms), grads = losses(latent, codebook, params)
  for name, term in terms.items():
    yield Check(f'train_{name}_loss', term, a[f'train_{name}_loss'], atol=0.0)
  yield gradient('latent', grads[0], nhwc(a['grad_latent']))
  yield gradient('codebook', grads[1], a['grad_codebook'])
  straight = through(latent, params, nhwc(a['st_weight']))
  yield gradient('straight through', straight, nhwc(a['st_grad_latent']))
