"""DINOv2 and T5 against their fixtures.

In: a `Fixture` of `dinov2`, `dinov2_reg`, `dinov2_swiglu`, `dinov2_hf` or `t5`.
Out: features of the last and of middle layers, position tables and biases,
beside the reference's. Used by `selftest.py`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert import dinov2, t5
from scar_jax.convert.selftest import Check, Fixture
from scar_jax.models.encoders.dinov2 import DINOv2
from scar_jax.models.encoders.t5 import T5Encoder

_PIXELS = dict(native=(70, 70), up=(112, 112), down=(42, 42), rect=(56, 98))


def outputs(fixture: Fixture) -> Iterator[Check]:
  """Every output of a fixture that the model has."""
  if fixture.name == 't5':
    yield from _t5(fixture)
  elif fixture.name == 'dinov2_hf':
    yield from _dinov2_hf(fixture)
  else:
    yield from _dinov2(fixture)


def _image(fixture: Fixture) -> np.ndarray:
  return fixture.arrays['image'].astype(np.float32).transpose(0, 2, 3, 1)


def _network(fixture: Fixture, heads: str, **changes: Any) -> Any:
  """A jitted `(image, layers) -> ViTOutput`, the model and its variables."""
  found = dinov2.detect(
    fixture.tensors, heads=fixture.meta[heads], image_size=112
  )
  cfg = dataclasses.replace(found.network(), **changes)
  model = DINOv2(cfg)
  variables = {'params': dinov2.convert(cfg, fixture.tensors)}
  apply = jax.jit(model.apply, static_argnames=('layers',))
  image = _image(fixture)

  def run(size: tuple[int, int], layers: tuple[int, ...] = ()) -> Any:
    h, w = size
    return apply(variables, image[:, :h, :w], layers=layers)

  return run, model, variables


def _dinov2(fixture: Fixture) -> Iterator[Check]:
  a = fixture.arrays
  run, model, variables = _network(fixture, 'num_heads')
  first = 1 + model.cfg.registers
  for size, pixels in _PIXELS.items():
    if f'{size}_x_norm_clstoken' not in a:
      continue
    name = f'{size}_pos_embed'
    grid = tuple(n // model.cfg.patch for n in pixels)
    rows = model.apply(variables, grid, method='positions')
    yield Check(name, rows, a[name][0], 0.0, 1e-5)
    wanted = tuple(range(model.cfg.depth)) if size == 'up' else ()
    out = run(pixels, wanted)
    ours = {
      'x_norm_patchtokens': out.patches,
      'x_norm_clstoken': out.cls,
      'x_norm_regtokens': out.registers,
      'x_prenorm': out.prenorm,
    }
    for i in wanted:
      layer = out.layers[i]
      normed = model.apply(variables, layer, method=lambda m, x: m.norm(x))
      ours[f'layer{i}_norm_patch'] = normed[:, first:]
      ours[f'layer{i}_norm_cls'] = normed[:, 0]
      ours[f'layer{i}_raw_patch'] = layer[:, first:]
    for key, value in ours.items():
      name = f'{size}_{key}'
      if name in a:
        yield Check(name, value, a[name])


def _dinov2_hf(fixture: Fixture) -> Iterator[Check]:
  a = fixture.arrays
  # The port fits positions by size, without the offset of the original.
  run, model, variables = _network(
    fixture, 'num_attention_heads', pos_interp='size'
  )
  embed = functools.partial(model.apply, variables, method='embed')
  # Layers come in the order in which they are asked for.
  layers = tuple(reversed(range(model.cfg.depth)))
  for size, pixels in _PIXELS.items():
    if f'{size}_last_hidden_state' not in a:
      continue
    out = run(pixels, layers)
    last = jnp.concatenate([out.cls[:, None], out.patches], axis=1)
    name = f'{size}_last_hidden_state'
    yield Check(name, last, a[name])
    for i, layer in zip(layers, out.layers, strict=True):
      name = f'{size}_hidden{i + 1}'
      yield Check(name, layer, a[name])
    h, w = pixels
    entering = embed(_image(fixture)[:, :h, :w])
    yield Check(f'{size}_hidden0', entering, a[f'{size}_hidden0'])


def _t5(fixture: Fixture) -> Iterator[Check]:
  a = fixture.arrays
  cfg = t5.detect(fixture.tensors)
  model: Any = T5Encoder(cfg)
  variables = {'params': t5.convert(cfg, fixture.tensors)}
  apply = jax.jit(model.apply, static_argnames=('method',))
  ids, mask = a['input_ids'], a['attention_mask'].astype(bool)
  out = apply(variables, ids, mask)
  yield Check('last_hidden_state', out, a['last_hidden_state'])
  _, entering = apply(variables, ids, mask, method='hidden_states')
  for i in range(cfg.layers):
    if f'hidden_{i}' in a:
      yield Check(f'hidden_{i}', entering[i], a[f'hidden_{i}'])
  name = 'last_hidden_state_nomask20'
  yield Check(name, apply(variables, ids[:, :20]), a[name])
  bias = model.apply(variables, 150, method='position_bias')[:, :, ::7]
  yield Check('position_bias', bias, a['position_bias'])
