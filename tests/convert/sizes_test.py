"""Published sizes: counted, and told from the shapes of their tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.convert import dinov2, editar, families, llamagen_vq, t5
from scar_jax.convert.common import flatten, torch_shape
from scar_jax.models.decoder import decoder_size
from scar_jax.models.encoders.dinov2 import DINOv2, dinov2_config
from scar_jax.models.encoders.t5 import T5Encoder, t5_config
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.text_embedder import TextCondition
from scar_jax.models.tokenizers.vq import VQModel, vq_config


def torch_shapes(entries, abstract):
  """The tensors of a checkpoint of this size, without making any."""
  leaves, shapes = flatten(abstract), {}
  for entry in entries:
    shape = tuple(leaves[entry.path].shape)
    layers = range(shape[0]) if entry.stacked else (None,)
    for i in layers:
      own = shape if i is None else shape[1:]
      for name in entry.names(i):
        shapes[name] = jax.ShapeDtypeStruct(torch_shape(entry, own), np.float32)
  return shapes


def total(shapes):
  return sum(int(np.prod(s.shape)) for s in shapes.values())


def gpt(size, caption):
  decoder = decoder_size(size)
  text = TextCondition(kind='label')
  if caption:
    text = TextCondition(kind='t5', mask_pad=True)
  prefix = PrefixConfig('off', grid=(16, 16), out=decoder.width)
  cfg = ScarConfig(decoder=decoder, prefix=prefix, text=text, grid=(16, 16))
  return torch_shapes(editar.table(cfg), editar.abstract_params(cfg))


@pytest.mark.parametrize(
  ('size', 'millions'),
  [('B', 111), ('L', 343), ('XL', 775), ('XXL', 1411), ('3B', 3100)],
)
@pytest.mark.parametrize('caption', [False, True])
def test_llamagen(size, millions, caption):
  shapes = gpt(size, caption)
  family = families.detect_family(shapes)
  cfg = families.detect_config(family, shapes, {})
  assert family.name == 'llamagen-gpt'
  assert families.size_name(family, cfg) == size
  assert cfg.model.text.kind == ('t5' if caption else 'label')
  assert cfg.image_size == 256
  large = families.detect_config(family, shapes, {'image_size': 384})
  assert large.model.grid == (24, 24)
  if not caption:
    assert total(shapes) / 1e6 == pytest.approx(millions, rel=0.015)


@pytest.mark.parametrize(('size', 'count'), [('vq16', 71.9), ('vq8', 70.1)])
def test_llamagen_vq(size, count):
  cfg = vq_config(size)
  image = jnp.zeros((1, 16, 16, 3))
  abstract = jax.eval_shape(VQModel(cfg).init, jax.random.key(0), image)
  shapes = torch_shapes(llamagen_vq.table(cfg), abstract['params'])
  assert total(shapes) / 1e6 == pytest.approx(count, abs=0.05)
  family = families.detect_family(shapes)
  assert family.name == 'llamagen-vq'
  assert families.detect_config(family, shapes, {}) == cfg
  assert families.size_name(family, cfg) == size


@pytest.mark.parametrize('hugging_face', [False, True])
@pytest.mark.parametrize(
  ('size', 'millions'),
  [('S', 22.1), ('B', 86.6), ('B_reg', 86.6), ('L', 304.4), ('g', 1136.5)],
)
def test_dinov2(size, millions, hugging_face):
  cfg = dinov2_config(size)
  image = jnp.zeros((1, 28, 28, 3))
  abstract = jax.eval_shape(DINOv2(cfg).init, jax.random.key(0), image)
  table = dinov2.table(cfg, hugging_face)
  shapes = torch_shapes(table, abstract['params'])
  assert total(shapes) / 1e6 == pytest.approx(millions, abs=0.1)
  family = families.detect_family(shapes)
  assert family.name == 'dinov2'
  found = families.detect_config(family, shapes, {})
  assert families.size_name(family, found) == size


@pytest.mark.parametrize('size', ['flan-t5-xl', 'flan-t5-base'])
def test_t5(size):
  cfg = t5_config(size)
  ids = jnp.zeros((1, 4), jnp.int32)
  abstract = jax.eval_shape(T5Encoder(cfg).init, jax.random.key(0), ids)
  shapes = torch_shapes(t5.table(), abstract['params'])
  if size == 'flan-t5-xl':
    assert total(shapes) == 1_223_527_424
  family = families.detect_family(shapes)
  assert family.name == 't5'
  assert families.detect_config(family, shapes, {}) == cfg
  assert families.size_name(family, cfg) == size


def test_editar_and_scar_are_told_from_llamagen():
  shapes = gpt('XL', caption=True)
  null = jax.ShapeDtypeStruct((1024, 1280), np.float32)
  shapes['img_uncond_embedding'] = null
  family = families.detect_family(shapes)
  cfg = families.detect_config(family, shapes, {'tokenizer': 'runs/vq'})
  assert (family.name, cfg.image_size, cfg.tokenizer) == (
    'editar',
    512,
    'runs/vq',
  )
  assert cfg.model.cond_dropout == 'joint'
  assert cfg.model.prefix.compress == 'vq'
  assert not cfg.model.text.mask_pad
  for name, shape in {
    'dino_mlp.weight': (1280, 3072),
    'downsample_conv.weight': (3072, 3072, 3, 3),
  }.items():
    shapes[name] = jax.ShapeDtypeStruct(shape, np.float32)
  family = families.detect_family(shapes)
  cfg = families.detect_config(family, shapes, {})
  assert family.name == 'scar'
  assert cfg.model.prefix.grid == (32, 32)
  assert cfg.model.prefix.width == 3072


def test_a_rotary_table_tells_heads_and_grid():
  shapes = gpt('B', caption=False)
  shapes['freqs_cis'] = jax.ShapeDtypeStruct((577, 32, 2), np.float32)
  family = families.detect_family(shapes)
  cfg = families.detect_config(family, shapes, {})
  assert cfg.model.grid == (24, 24)
  with pytest.raises(ValueError, match='--image_size=256; accepted: 384'):
    families.detect_config(family, shapes, {'image_size': 256})
