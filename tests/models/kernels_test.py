"""Flash kernels against plain attention, for the layouts of all orders."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scar_cases import tiny_config, tiny_model

from scar_jax.models.attention import attend, choose_backend
from scar_jax.models.kernels import (
  SetCausalMask,
  cudnn_attention,
  splash_attention,
  tiles,
)
from scar_jax.models.scar import Scar
from scar_jax.models.text_embedder import TextCondition
from scar_jax.orders.layout import make_layout, set_mask
from scar_jax.orders.random import RandomOrder
from scar_jax.orders.raster import RasterOrder
from scar_jax.orders.scale import ScaleOrder
from scar_jax.sharding import make_mesh

TEXT = 5
LAYOUTS = {
  'raster': make_layout(RasterOrder((8, 8)), (4, 4), TEXT),
  'causal': make_layout(RasterOrder((8, 8)), (4, 4), TEXT, 'causal'),
  'scale': make_layout(ScaleOrder((1, 2, 3, 5)), (4, 4), TEXT),
  'random': make_layout(RandomOrder((6, 6), 3), (4, 4), TEXT),
  # Two tiles along each axis.
  'long': make_layout(RandomOrder((16, 16), 8), (4, 4), TEXT),
}


@pytest.mark.parametrize(
  ('length', 'expected'),
  [(7, (128, 128)), (320, (384, 384)), (744, (384, 768)), (1399, (512, 1536))],
)
def test_tiles_pad_as_little_as_they_can(length, expected):
  assert tiles(length) == expected


@pytest.mark.parametrize('name', LAYOUTS)
def test_the_computed_mask_is_the_rule(name):
  ids = LAYOUTS[name].set_ids
  size = tiles(len(ids))[1]
  ours = SetCausalMask(ids, size)[slice(0, size), slice(0, size)]
  L = len(ids)
  np.testing.assert_array_equal(ours[:L, :L], set_mask(ids, ids)[0])
  assert not ours[:L, L:].any()  # no query sees the end's padding
  assert ours.any(-1).all()  # and no row is empty
  assert hash(SetCausalMask(ids, size)) == hash(SetCausalMask(ids, size))
  assert SetCausalMask(ids, size) != SetCausalMask(ids[1:], size)


def _case(name, batch=2, heads=2, padded=True):
  """Random q, k, v; text padding left and right; a weight for the loss."""
  layout = LAYOUTS[name]
  shape = (batch, layout.length, heads, 8)
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, weight = (jax.random.normal(key, shape) for key in keys)
  valid = np.ones(shape[:2], bool)
  valid[0, layout.set0_len - 3 : layout.set0_len] = False
  valid[1, layout.prefix_len : layout.prefix_len + 2] = False
  sets = dict(
    set_ids=layout.set_ids, padding=(layout.prefix_len, layout.set0_len)
  )
  return (q, k, v), weight, valid if padded else None, sets


def _check(kernel, args, weight, valid, sets):
  """Values and gradients of a kernel are those of plain attention."""
  mask = set_mask(sets['set_ids'], sets['set_ids'], valid)

  def loss(attention):
    def run(q, k, v):
      out = attention(q, k, v)
      return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))

  ours = loss(lambda q, k, v: kernel(q, k, v, 0.3, valid, **sets))(*args)
  plain = loss(lambda q, k, v: attend(q, k, v, mask, 0.3))(*args)
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(compare, ours, plain)


@pytest.mark.parametrize(
  ('name', 'padded'),
  [('raster', True), ('causal', False), ('scale', False), ('long', True)],
)
def test_splash_equals_plain_attention(name, padded):
  _check(splash_attention, *_case(name, padded=padded))


def test_splash_runs_on_the_rows_and_heads_of_each_device():
  args, weight, valid, sets = _case('raster', batch=4, heads=4, padded=False)
  valid = np.ones(args[0].shape[:2], bool)
  valid[2, 18:20] = False
  with jax.set_mesh(make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})):
    _check(splash_attention, args, weight, valid, sets)
    text = jax.jit(
      lambda q, k, v: splash_attention(q, k, v, 1.0, None, **sets)
    ).lower(*args).as_text()  # fmt: skip
  # One row and two heads per device, padded to a tile.
  assert 'tensor<1x2x128x8xf32>' in text


@pytest.mark.parametrize(
  ('name', 'padded'),
  [('causal', False), ('raster', True), ('scale', False), ('random', False)],
)
def test_cudnn_gets_a_mask_that_means_the_same(name, padded):
  """Its arguments, given to XLA: there is no GPU here."""
  kernel = functools.partial(cudnn_attention, implementation='xla')
  case = _case(name, padded=padded)
  assert name != 'random' or len(case[-1]['set_ids']) % 2  # one odd length
  _check(kernel, *case)


def _chosen(wanted='auto', platform='tpu', ids=None, **changes):
  ids = np.arange(200) if ids is None else ids
  given = dict(head_dim=64, dtype='bfloat16') | changes
  return choose_backend(wanted, platform, ids, **given)


def test_auto_takes_the_kernel_where_it_can():
  assert _chosen() == 'splash'
  assert _chosen(key_valid=True, padding=(3, 9)) == 'splash'
  for other in (
    dict(platform='cpu'),
    dict(platform='gpu'),
    dict(ids=np.arange(100)),
    dict(ids=jnp.arange(200)),
    dict(ids=np.arange(200)[::-1]),
    dict(dropout=True),
    dict(key_valid=True),
    dict(wanted='xla'),
  ):
    assert _chosen(**other) == 'xla'
  assert _chosen('splash', ids=np.arange(3)) == 'splash'
  assert _chosen('cudnn', 'gpu') == 'cudnn'


@pytest.mark.parametrize(
  ('wanted', 'changes', 'message'),
  [
    ('splash', {'platform': 'gpu'}, r'it runs on tpu, not gpu; accepted: auto'),
    ('splash', {'dropout': True}, r'attention dropout \(set --config\.model'),
    ('splash', {'ids': np.array([1, 0])}, r'set ids that fall'),
    ('splash', {'ids': jnp.arange(2)}, r'set ids that are traced'),
    ('splash', {'key_valid': True}, r'padding at unknown positions'),
    ('cudnn', {'platform': 'tpu'}, r"'cudnn' cannot .* runs on gpu, not tpu"),
    ('cudnn', {'dtype': 'float32'}, r'float32 \(set --config\.model\.dtype'),
    (
      'cudnn',
      {'head_dim': 100},
      r'heads of 100 channels, where multiples',
    ),
  ],
)
def test_what_a_backend_cannot_do_is_an_error_that_says_why(
  wanted, changes, message
):
  given = {'platform': 'gpu' if wanted == 'cudnn' else 'tpu'} | changes
  with pytest.raises(ValueError, match=message):
    _chosen(wanted, **given)


def test_the_model_is_the_same_with_a_kernel():
  """Through scan, remat, places of each sample and the padding of the text."""
  base = tiny_config(
    order='random',
    num_sets=2,
    text=TextCondition(kind='t5', length=3, width=5, mask_pad=True),
  )
  _, variables, cond = tiny_model(base)
  cond = cond.replace(text_mask=jnp.arange(3) < jnp.array([[1], [2], [3]]))
  tokens = jnp.arange(18).reshape(3, 6) % 11
  perm = jnp.stack([jnp.roll(jnp.arange(6), i) for i in range(3)])

  def run(**changes):
    decoder = dataclasses.replace(base.decoder, **changes)
    model = Scar(dataclasses.replace(base, decoder=decoder))

    def loss(params):
      out = model.apply({'params': params}, tokens, cond, perm=perm)
      return jnp.sum(out.logits**2), out.logits

    grad = jax.value_and_grad(loss, has_aux=True)
    return jax.jit(grad)(variables['params'])

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
    run(attention='splash', remat='attention'),
    run(attention='xla'),
  )
