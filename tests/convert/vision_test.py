"""Names and sizes of ViT, CLIP and SAM."""

import dataclasses

import jax
import numpy as np
import pytest

from scar_jax.convert import clip, families, sam, vit
from scar_jax.convert.common import disassemble, flatten
from scar_jax.models.encoders.clip import clip_config
from scar_jax.models.encoders.sam import sam_config
from scar_jax.models.encoders.semantic import encoder_around, encoder_config
from scar_jax.models.encoders.vit import vit_config


def _detect(name, tensors):
  """Networks of the fixtures, whose heads are not of 64 channels."""
  if name == 'vit':
    network = vit.detect_network(tensors, heads=3)
    return vit, dataclasses.replace(network, pooler=True)
  if name == 'sam':
    return sam, sam.detect_network(tensors)
  return clip, clip.detect(tensors, part='both', heads=4, text_heads=4)


@pytest.mark.parametrize('name', ['vit', 'clip', 'sam'])
def test_every_tensor_is_used_and_comes_back(golden, name):
  tensors, _ = golden(name)
  module, cfg = _detect(name, tensors)
  params = module.convert(cfg, tensors)
  back = disassemble(module.table(cfg), params)
  assert set(back) == set(tensors)
  for key, value in back.items():
    np.testing.assert_array_equal(value, tensors[key])


@pytest.mark.parametrize('name', ['vit', 'sam'])
def test_the_original_names_give_the_same(golden, name):
  """timm's ViT and Meta's SAM: other names, q, k and v in one tensor."""
  tensors, _ = golden(name)
  module, cfg = _detect(name, tensors)
  if name == 'vit':
    cfg = dataclasses.replace(cfg, pooler=False)
  params = module.convert(cfg, tensors)
  original = disassemble(module.table(cfg, hugging_face=False), params)
  if name == 'vit':
    assert original['blocks.2.attn.qkv.weight'].shape == (108, 36)
    original['head.weight'] = np.zeros((1000, 36))
    again, found = original, vit.detect_network(original, heads=3)
  else:
    again = {f'image_encoder.{k}': v for k, v in original.items()}
    assert 'image_encoder.blocks.1.mlp.lin1.weight' in again
    again['mask_decoder.x'] = again['prompt_encoder.y'] = np.zeros(1)
    found = sam.detect_network(again)
  assert dataclasses.replace(found, norm_eps=cfg.norm_eps) == cfg
  same = module.convert(cfg, again)
  jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize(
  ('module', 'prefix'), [(vit, 'vit.'), (sam, 'vision_encoder.')]
)
def test_prefixes_of_whole_models(golden, module, prefix):
  name = prefix[:3] if module is vit else 'sam'
  tensors, _ = golden(name)
  _, cfg = _detect(name, tensors)
  whole = {f'{prefix}{k}': v for k, v in tensors.items()}
  same = module.convert(cfg, whole)
  want = module.convert(cfg, tensors)
  jax.tree.map(np.testing.assert_array_equal, same, want)
  with pytest.raises(ValueError, match='two tensors of one name'):
    module.convert(cfg, whole | tensors)


@pytest.mark.parametrize('size', ['B/32', 'B/16', 'L/14', 'L/14@336'])
def test_clip_towers_of_the_full_sizes_share_their_tables(size):
  cfg = clip_config(size)
  paths = [entry.path for entry in clip.table(cfg)]
  assert len(set(paths)) == len(paths)
  for tower in ('vision', 'text'):
    alone = {entry.path for entry in clip.table(getattr(cfg, tower))}
    assert {f'{tower}/{path}' for path in alone} <= set(paths)


def test_clip_gives_each_part(golden):
  tensors, _ = golden('clip')
  whole = clip.convert(_detect('clip', tensors)[1], tensors)
  encoder = clip.detect(tensors, heads=4)
  assert (encoder.kind, encoder.image_size) == ('clip', 224)
  assert encoder.normalize == 'clip'
  kind, cfg, params = clip.artifact(encoder, clip.convert(encoder, tensors))
  assert (kind, cfg) == ('encoder', encoder)
  same = params['network'], whole['vision']
  jax.tree.map(np.testing.assert_array_equal, *same)
  text = clip.detect(tensors, part='text', text_heads=4)
  assert clip.artifact(text, {})[0] == 'clip_text'
  same = clip.convert(text, tensors), whole['text']
  jax.tree.map(np.testing.assert_array_equal, *same)
  # A file of one tower, with a buffer that old versions wrote.
  alone = {k: v for k, v in tensors.items() if k.startswith('text_model.')}
  alone['text_model.embeddings.position_ids'] = np.arange(20)[None]
  assert clip.detect(alone, text_heads=4) == text
  assert clip.convert(text, alone)
  with pytest.raises(ValueError, match="'all'; accepted: vision, text, both"):
    clip.detect(tensors, part='all')


@pytest.mark.parametrize(
  ('module', 'size', 'other'),
  [
    (vit, 'S/16', dict(table=14)),
    (vit, 'B/8', {}),
    (clip, 'B/32', {}),
    (clip, 'L/14@336', {}),
    (sam, 'B', dict(neck=0)),
    (sam, 'H', {}),
  ],
)
def test_sizes_have_names(module, size, other):
  named = {vit: vit_config, sam: sam_config}
  if module is clip:
    network = clip_config(size).vision
    assert clip.size(clip_config(size)) == size
  else:
    network = named[module](size, **other)
  assert module.size(encoder_around(network)) == size
  odd = dataclasses.replace(network, depth=99)
  assert module.size(encoder_around(odd)) == 'custom'


@pytest.mark.parametrize('name', ['vit', 'clip', 'sam'])
def test_the_registry_knows_the_family(golden, name):
  tensors, _ = golden(name)
  assert families.detect_family(tensors).name == name


@pytest.mark.parametrize('name', ['vit', 'clip', 'sam'])
def test_missing_unexpected_and_misshapen_tensors_are_listed(golden, name):
  tensors, _ = golden(name)
  module, cfg = _detect(name, tensors)
  broken = dict(tensors)
  gone, bent = sorted(k for k in tensors if k.endswith('.bias'))[:2]
  del broken[gone]
  broken[bent] = np.zeros(7, np.float32)
  broken['surprise'] = np.zeros(3)
  with pytest.raises(ValueError, match='1 tensors missing') as error:
    module.convert(cfg, broken)
  for part in (gone, bent, '(7,)', 'surprise'):
    assert part in str(error.value)


def test_heads_that_no_tensor_shows(golden):
  tensors, _ = golden('vit')
  with pytest.raises(ValueError, match='width 36 is no multiple of 64'):
    vit.detect(tensors)
  assert vit.public_heads(1024) == 16
  assert vit.public_heads(1280) == 16  # the huge models have heads of 80
  encoder = vit.detect(tensors, heads=3, image_size=96, normalize='imagenet')
  assert (encoder.image_size, encoder.normalize) == (96, 'imagenet')
  assert encoder.network().table == 8


def test_an_encoder_leaves_out_what_features_do_not_need(golden):
  for name, heads in (('vit', {'heads': 3}), ('sam', {})):
    tensors, _ = golden(name)
    module, _ = _detect(name, tensors)
    encoder = module.detect(tensors, **heads)
    params = module.convert(encoder, tensors)
    assert not any('neck' in p or 'pooler' in p for p in flatten(params))
    assert module.artifact(encoder, params) == (
      *('encoder', encoder, {'network': params}),
    )
  assert encoder_config('sam-B').network() == sam_config('B', neck=0)
