"""FLOPs from shapes, against what the lowered programs hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_setup import scar_batch, scar_config

from scar_jax.flops import mask_area, sample_flops, step_flops
from scar_jax.flops_networks import (
  encoder_flops,
  t5_flops,
  tokenizer_decode_flops,
  tokenizer_encode_flops,
)
from scar_jax.models.decoder import DecoderConfig, SetDecoder
from scar_jax.models.encoders.semantic import SemanticEncoder, encoder_config
from scar_jax.models.encoders.t5 import T5Encoder, t5_config
from scar_jax.models.tokenizers import layers as tokenizer_layers
from scar_jax.models.tokenizers.make import make_tokenizer, tokenizer_config
from scar_jax.orders.layout import set_mask
from scar_jax.plan.costs import count
from scar_jax.plan.hlo import parse
from scar_jax.plan.networks import abstract_artifacts
from scar_jax.sharding import unbox
from scar_jax.train.tasks import make_task


def _counted(function, *args):
  """Matrix products of a program as traced, before any optimisation."""
  text = jax.jit(function).lower(*args).as_text('hlo')
  return count(parse(text), {'data': 1}).flops


def _dense(parts, layout):
  """With attention over all pairs, which the plain backend computes."""
  more = layout.length**2 / mask_area(layout.set_ids) - 1
  return sum(parts.values()) + more * parts['attention']


def _task(order='raster', **changes):
  vq = 'tiny,codes=64,ch=8,z_channels=8,code_dim=4'
  if order == 'scale':
    vq = 'tiny,patch_nums=1,2,codes=64,ch=8,code_dim=4'
  config = scar_config(
    order__name=order,
    tokenizer__size=vq,
    encoder__size='tiny,image_size=16,width=16,depth=1',
    **(dict(model__width=32, model__layers=2, text__width=16) | changes),
  )
  return make_task(config, abstract_artifacts(config))


@pytest.mark.parametrize(
  ('order', 'changes'),
  [
    ('raster', {}),
    ('raster', {'prefix__compress': 'unshuffle', 'loss__align': 0.0}),
    ('random', {'prefix__compress': 'conv', 'order__num_sets': 2}),
    ('scale', {'prefix__compress': 'full', 'prefix__k': 2}),
    ('raster', {'prefix__inject': 'cross', 'loss__align': 0.0}),
    (
      'scale',
      {'prefix__inject': 'fusion', 'prefix__k': 1, 'loss__align': 0.0},
    ),
  ],
)
def test_a_step_spends_what_its_shapes_say(order, changes):
  task = _task(order, **changes)
  batch = scar_batch(2)
  params = jax.eval_shape(task.init, jax.random.key(0), batch)['params']

  def grads(params, frozen, batch):
    def loss(p):
      return task.loss(p, {}, frozen, batch, jax.random.key(0), True)[0]

    return jax.grad(loss)(params)

  found = _counted(grads, unbox(params), task.frozen, batch)
  wanted = _dense(task.flops(2), task.editor.model.make_layout())
  assert 0.95 < found / wanted < 1.10


def test_layers_agree_with_xla_on_an_unrolled_model():
  cfg = DecoderConfig(
    width=128, layers=2, heads=2, vocab=64, scan=False, multiple_of=32
  )
  x = jax.ShapeDtypeStruct((4, 32, 128), jnp.float32)
  decoder = SetDecoder(cfg)
  ids = np.arange(32)

  def call(params, x):
    hidden, _ = decoder.apply(params, x, None, ids)
    return decoder.apply(params, hidden, method='logits')

  def whole(module, x):
    return module.logits(module(x, None, ids)[0])

  params = jax.eval_shape(
    lambda x: decoder.init(jax.random.key(0), x, method=whole), x
  )
  compiled = jax.jit(call).lower(params, x).compile()
  ours = count(parse(compiled.as_text()), {'data': 1}).flops
  theirs = compiled.cost_analysis()['flops']
  # Theirs holds norms, softmax and the rotation too.
  assert 0.9 * theirs < ours < theirs
  layers = 4 * 32 * (4 * 128**2 + 3 * 128 * cfg.hidden)
  attention = 4 * 2 * 32 * 32 * 128
  assert ours == 2 * (2 * (layers + attention) + 4 * 32 * 128 * 64)


@pytest.mark.parametrize('causal', [True, False])
def test_the_area_is_that_of_the_mask(causal):
  ids = np.concatenate([np.arange(-5, 0) if causal else np.zeros(5), [1, 2, 2]])
  assert mask_area(ids) == int(set_mask(ids, ids).sum())


@pytest.mark.parametrize(
  'size', ['B', 'g', 'clip-B/16', 'sam-B', 'vit-B/16', 'tiny']
)
def test_encoders_spend_what_their_shapes_say(size):
  cfg = encoder_config(size)
  few = dict(global_layers=(1,)) if cfg.kind == 'sam' else {}
  cfg = dataclasses.replace(cfg, depth=2, **few)
  module = SemanticEncoder(cfg)
  side = cfg.image_size
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), image)
  found = _counted(module.apply, params, image)
  assert 0.98 < found / encoder_flops(cfg) < 1.02


def test_a_t5_spends_what_its_shapes_say():
  cfg = t5_config('flan-t5-small', layers=2)
  module = T5Encoder(cfg)
  ids = jax.ShapeDtypeStruct((1, 24), jnp.int32)
  params = jax.eval_shape(module.init, jax.random.key(0), ids)
  assert _counted(module.apply, params, ids) == t5_flops(cfg, 24)


_SMALL = dict(ch=32, ch_mult=(1, 2), codes=64, res_blocks=1)


@pytest.mark.parametrize(
  ('size', 'fields', 'side'),
  [
    ('vq16', _SMALL, 16),
    ('var256', _SMALL | dict(patch_nums=(1, 2, 4)), 8),
    ('tiny', {}, 32),
  ],
)
def test_tokenizers_spend_what_their_shapes_say(
  size, fields, side, monkeypatch
):
  # CPUs leave out taps of the convolutions that double a map.
  monkeypatch.setattr(tokenizer_layers, 'platform', lambda: 'tpu')
  cfg = tokenizer_config(size, **fields)
  module = make_tokenizer(cfg)
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), image)

  def encode(params, image):
    return module.apply(params, image, method='encode')[0]

  def decode(params, ids):
    return module.apply(params, ids, method='decode_tokens')

  ids = jax.eval_shape(encode, params, image)
  found = _counted(encode, params, image) / tokenizer_encode_flops(cfg, side)
  assert 0.95 < found < 1.05
  found = _counted(decode, params, ids) / tokenizer_decode_flops(cfg, side)
  assert 0.95 < found < 1.05


def test_sampling_costs_a_forward_pass_for_each_branch():
  cfg = _task().editor.model
  step, one, two = (
    step_flops(cfg, 4, preserve=False, align=False),
    sample_flops(cfg, 4),
    sample_flops(cfg, 4, branches=2),
  )
  for part in ('layers', 'attention', 'head'):
    assert step[part] == 3 * one[part]
    assert two[part] == 2 * one[part]
