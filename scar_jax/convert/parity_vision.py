"""ViT, CLIP and SAM against their fixtures.

In: a `Fixture` of `vit`, `clip` or `sam`. Out: what every layer gives, pooled
features, keys, embeddings and scores, beside the reference's. Used by
`selftest.py`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.convert import clip, sam, vit
from scar_jax.convert.selftest import Check, Fixture
from scar_jax.models.encoders.clip import CLIP, CLIPText, CLIPVision, clip_score
from scar_jax.models.encoders.sam import SAM
from scar_jax.models.encoders.vit import ViT


def outputs(fixture: Fixture) -> Iterator[Check]:
  """Every output of a fixture that the model has."""
  run = {'vit': _vit, 'clip': _clip, 'sam': _sam}[fixture.name]
  for name, ours in run(fixture):
    want = fixture.arrays[name]
    if fixture.name == 'sam':
      # Our layers are rows of positions, the reference's are maps.
      ours = jnp.reshape(ours, want.shape)
    # Scores are percentages.
    atol = 1e-3 if name == 'clip_score' else 1e-4
    yield Check(name, ours, want, atol=atol)


def _images(fixture: Fixture, name: str = 'pixel_values') -> np.ndarray:
  return fixture.arrays[name].astype(np.float32).transpose(0, 2, 3, 1)


def _apply(model: Any, params: Any, *inputs: Any, **fixed: Any) -> Any:
  run = jax.jit(lambda p, x: model.apply({'params': p}, *x, **fixed))
  return run(params, inputs)


def _vit(fixture: Fixture) -> Iterator[tuple[str, Any]]:
  heads = fixture.meta['num_attention_heads']
  cfg = dataclasses.replace(
    vit.detect_network(fixture.tensors, heads=heads),
    norm_eps=fixture.meta['layer_norm_eps'],
    pooler=True,
  )
  model, params = ViT(cfg), vit.convert(cfg, fixture.tensors)
  images = _images(fixture)
  out = _apply(model, params, images, layers=tuple(range(cfg.depth)))
  yield 'last_hidden_state', _tokens(out)
  for i, layer in enumerate(out.layers):
    yield f'hidden_{i + 1}', layer
  for name, method in {
    'hidden_0': 'embed',
    'pooler_output': 'pool',
    'last_layer_keys': 'last_keys',
  }.items():
    yield name, _apply(model, params, images, method=method)
  wide = _apply(model, params, _images(fixture, 'pixel_values_96x48'))
  yield 'last_hidden_state_96x48', _tokens(wide)


def _tokens(out: Any) -> Any:
  return jnp.concatenate([out.cls[:, None], out.patches], axis=1)


def _clip(fixture: Fixture) -> Iterator[tuple[str, Any]]:
  cfg: Any = clip.detect(
    fixture.tensors,
    part='both',
    heads=fixture.meta['vision_config']['num_attention_heads'],
    text_heads=fixture.meta['text_config']['num_attention_heads'],
  )
  params = clip.convert(cfg, fixture.tensors)
  images, ids = _images(fixture), fixture.arrays['input_ids']
  mask = fixture.arrays['attention_mask'].astype(bool)
  out = _apply(CLIPVision(cfg.vision), params['vision'], images, layers=(1,))
  yield 'vision_last_hidden_state', out.prenorm
  yield 'vision_hidden_2', out.layers[0]
  yield 'vision_pooled', out.cls
  text = CLIPText(cfg.text)
  for end, given in (('', (ids, mask)), ('_nomask', (ids,))):
    states, pooled = _apply(text, params['text'], *given)
    yield f'text_last_hidden_state{end}', states
    yield f'text_pooled{end}', pooled
  image = _apply(CLIP(cfg), params, images, method='embed_images')
  words = _apply(CLIP(cfg), params, ids, method='embed_text')
  yield 'image_embeds', image
  yield 'text_embeds', words
  yield 'logits_per_image', _apply(CLIP(cfg), params, images, ids)
  yield 'clip_score', clip_score(image, words)


def _sam(fixture: Fixture) -> Iterator[tuple[str, Any]]:
  cfg = sam.detect_network(fixture.tensors)
  model, params = SAM(cfg), sam.convert(cfg, fixture.tensors)
  images = _images(fixture)
  # Layers come in the order in which they are asked for.
  layers = tuple(reversed(range(cfg.depth)))
  out = _apply(model, params, images, layers=layers)
  yield 'hidden_0', _apply(model, params, images, method='embed')
  for i, layer in zip(layers, out.layers, strict=True):
    yield f'hidden_{i + 1}', layer
  yield 'last_hidden_state', jnp.transpose(out.neck, (0, 3, 1, 2))
