"""Mesh sizes, the rules, and a real model on eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scar_setup import frozen_artifacts, scar_batch, scar_config

from scar_jax import sharding
from scar_jax.config import OptimConfig
from scar_jax.models.conditions import empty_conditions
from scar_jax.models.decoder import decoder_size
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.text_embedder import TextCondition
from scar_jax.orders.scale import blank
from scar_jax.train import state as state_lib
from scar_jax.train.optim import make_optimizer
from scar_jax.train.step import compile_step, make_step
from scar_jax.train.tasks import abstract, make_task


def test_one_axis_takes_the_rest():
  assert sharding.axis_sizes({'data': -1, 'tensor': 2}, 8) == {
    'replica': 1,
    'data': 4,
    'fsdp': 1,
    'tensor': 2,
  }


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'data': 3}, r'multiply to 3, but there are 8 devices'),
    ({'data': -1, 'fsdp': 3}, r'multiply to 3, but there are 8'),
    ({'data': -1, 'fsdp': -1}, r'only one axis may be -1'),
    ({'data': 0}, r'an axis is 1 or more, or -1'),
  ],
)
def test_impossible_meshes_are_errors(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.axis_sizes(sizes, 8)


@pytest.mark.parametrize(
  ('axes', 'shape', 'spec'),
  [
    (('embed', 'mlp'), (8, 6), P('fsdp', 'tensor')),
    (('embed', 'mlp'), (6, 6), P(None, 'tensor')),  # 4 does not divide 6
    (('vocab', 'embed'), (7, 8), P(None, 'fsdp')),
    (('heads', 'mlp'), (4, 4), P('tensor', None)),  # an axis serves once
    (('batch', None), (16, 3), P(('data', 'fsdp'), None)),
    ((None, 'layers'), (8, 8), P(None, None)),
    (('table', None), (16, 8), P(('fsdp', 'tensor'), None)),
    (('table', None), (12, 8), P('fsdp', None)),  # the first that divide
    (('act_length', None), (7, 8), P(None, None)),
  ],
)
def test_rules_give_mesh_axes_where_sizes_divide(axes, shape, spec):
  mesh = {'replica': 1, 'data': 2, 'fsdp': 4, 'tensor': 2}
  assert sharding.logical_spec(axes, shape, mesh) == spec


def test_some_activations_need_not_divide():
  axes = ('batch', 'act_length', 'act_embed')
  spec = sharding.logical_spec(
    axes, (3, 7, 8), {'data': 2, 'tensor': 4}, {'act_length'}
  )
  assert spec == P(None, 'tensor', None)


@dataclasses.dataclass(frozen=True)
class _Chip:
  """A device of a slice, as far as a mesh asks."""

  id: int
  slice_index: int
  platform: str = 'cpu'
  device_kind: str = 'fake'
  process_index: int = 0


def test_replicas_cross_the_slices_and_nothing_else_does():
  chips = [_Chip(i, i % 2) for i in range(8)]  # listed in turn
  sizes = {'replica': 2, 'data': -1, 'fsdp': 2}
  mesh = sharding.make_mesh(sizes, chips)
  assert dict(mesh.shape) == {'replica': 2, 'data': 2, 'fsdp': 2, 'tensor': 1}
  of_slice = np.vectorize(lambda d: d.slice_index)(mesh.devices)
  assert (of_slice[0] == 0).all()
  assert (of_slice[1] == 1).all()
  mesh = sharding.make_mesh({'replica': 4, 'fsdp': 2}, chips)
  assert [d.slice_index for d in mesh.devices[:, 0, 0, 0]] == [0, 0, 1, 1]
  with pytest.raises(
    ValueError, match=r'mesh\.replica=1, .* in 2 slices .* multiples of 2'
  ):
    sharding.make_mesh({'fsdp': 8}, chips)


def test_a_misspelt_logical_axis_is_an_error():
  with pytest.raises(ValueError, match=r"unknown logical axis \['embd'\]"):
    sharding.annotated(jnp.zeros, 'embd', 'mlp')
  with pytest.raises(ValueError, match=r'unknown logical axis'):
    sharding.constrain(jnp.zeros((2, 2)), 'batch', 'emded')


def test_large_frozen_arrays_are_split_and_small_ones_copied():
  mesh = sharding.make_mesh({'fsdp': 8})
  tree = {
    'large': jax.ShapeDtypeStruct((24, 4096, 16), jnp.float32),
    'small': jax.ShapeDtypeStruct((64, 8), jnp.float32),
    'odd': jax.ShapeDtypeStruct((1001, 1003), jnp.float64),
  }
  places = sharding.frozen_shardings(tree, mesh)
  assert places['large'].spec == P(None, 'fsdp')
  assert places['small'].spec == places['odd'].spec == P()
  both = sharding.make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
  places = sharding.frozen_shardings(tree, both)
  assert places['large'].spec == P(None, ('fsdp', 'tensor'))
  assert places['odd'].spec == P()


_XL = ScarConfig(
  decoder=decoder_size('XL'), prefix=PrefixConfig(width=3072, out=1280)
)
_D30 = ScarConfig(
  order='scale',
  decoder=decoder_size('d30'),
  prefix=PrefixConfig(width=3072, out=1920),
  text=TextCondition(kind='label'),
  grid=(16, 16),
  patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
)


@functools.cache
def _boxed(cfg):
  """Shapes of all parameters."""
  tokens = jnp.zeros((1, cfg.make_order().num_targets), jnp.int32)
  init = functools.partial(
    Scar(cfg).init, accumulate=blank(cfg.patch_nums, cfg.latent_dim)
  )
  cond = empty_conditions(cfg, 1)
  return jax.eval_shape(init, jax.random.key(0), tokens, cond)['params']


@pytest.mark.parametrize('cfg', [_XL, _D30], ids=['XL', 'd30'])
@pytest.mark.parametrize(
  'sizes', [{'fsdp': 8}, {'tensor': 2, 'fsdp': 4}, {'data': 4, 'tensor': 2}]
)
def test_every_large_parameter_is_split_over_every_axis(cfg, sizes):
  """Full sizes, shapes only: decoder, compressor, restorer, text, tables."""
  mesh = sharding.make_mesh({'data': 1, **sizes})
  boxed = _boxed(cfg)
  params = sharding.unbox(boxed)
  places = sharding.tree_shardings(boxed, mesh)
  sharding.check_coverage(params, places, mesh)
  axes = {a for a in ('fsdp', 'tensor') if mesh.shape[a] > 1}
  whole = [
    (sharding.path_name(path), leaf.shape, place.spec)
    for (path, leaf), place in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(places),
      strict=True,
    )
    if leaf.size > 2**20 and not axes <= set(jax.tree.leaves(tuple(place.spec)))
  ]
  assert not whole


def test_a_large_parameter_left_whole_is_an_error():
  mesh = sharding.make_mesh({'fsdp': 8})
  shapes = {'head': {'kernel': jax.ShapeDtypeStruct((2048, 1024), jnp.float32)}}
  whole = {'head': {'kernel': sharding.replicated(mesh)}}
  with pytest.raises(ValueError, match=r'head/kernel \(2048, 1024\)'):
    sharding.check_coverage(shapes, whole, mesh)
  sharding.check_coverage(shapes, whole, mesh, exempt=('head',))


def _step(task, batch):
  cfg = OptimConfig(lr=1e-2)
  boxed = state_lib.abstract_variables(task, abstract(batch))
  tx = make_optimizer(cfg, 10, boxed['params'])
  init = state_lib.make_init(task, tx, abstract(batch), ema=True)
  return boxed, init, make_step(task, tx, cfg, 10, 1, 0.9)


@pytest.fixture(scope='module')
def scar():
  """SCAR in float32, without dropout, and three steps on one device."""
  task = make_task(
    scar_config(
      model__width=32, model__heads=4, model__layers=2,
      model__resid_dropout=0.0, model__ffn_dropout=0.0,
      model__token_dropout=0.0,
    ),
    frozen_artifacts(),
  )  # fmt: skip
  batch = scar_batch(8)
  boxed, init, step = _step(task, batch)
  state = jax.jit(init)(jnp.uint32(0))
  return task, batch, boxed, init, step, _run(step, state, task, batch)[0]


def _run(step, state, task, batch, places=None):
  """Losses of three steps, and the state after them."""
  step = compile_step(step, state, task.frozen, batch, places)
  found = []
  for _ in range(3):
    state, metrics = step(state, task.frozen, batch)
    found.append(float(metrics['loss']))
  return found, state


@pytest.mark.parametrize(
  'sizes', [{'data': 8}, {'fsdp': 8}, {'tensor': 2, 'fsdp': 4}]
)
def test_scar_is_sharded_by_the_rules_and_loses_the_same(scar, sizes):
  task, batch, boxed, init, step, want = scar
  mesh = sharding.make_mesh({'data': 1, **sizes})
  with jax.set_mesh(mesh):
    shapes = state_lib.abstract_state(init)
    places = state_lib.state_shardings(shapes, boxed, mesh)
    state = state_lib.create(init, places, 0)
    rows = jax.device_put(batch, sharding.batch_sharding(mesh))
    found, state = _run(step, state, task, rows, places)
  assert found == pytest.approx(want, rel=1e-5)
  # What the rules say of the largest kernels, written out.
  fsdp, tensor = sizes.get('fsdp', 1), sizes.get('tensor', 1)
  decoder = state.params['decoder']['layers']
  for kernel, parts in (
    (decoder['attn']['qkv']['kernel'], fsdp * tensor),
    (decoder['attn']['out']['kernel'], fsdp * tensor),
    (decoder['ffn']['w1']['kernel'], fsdp * tensor),
    (state.params['decoder']['token']['embedding'], fsdp * tensor),
    (decoder['ffn_norm']['scale'], 1),
  ):
    assert kernel.addressable_shards[0].data.size == kernel.size // parts
  # Both moments and the average lie as their parameters do.
  placed = [x.sharding.spec for x in jax.tree.leaves(state.params)]
  moments = [x.sharding.spec for x in jax.tree.leaves(state.opt_state[1][0].mu)]
  assert moments == placed
  assert [x.sharding.spec for x in jax.tree.leaves(state.ema)] == placed
  assert (mesh.shape['data'] == 8) == (not any(map(any, placed)))
  np.testing.assert_array_equal(np.asarray(state.step), 3)


def test_condition_and_target_are_encoded_where_they_lie():
  task = make_task(scar_config(), frozen_artifacts())
  mesh = sharding.make_mesh({'data': 8})
  where = sharding.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=where)
    for name, x in scar_batch(16).items()
  }
  features = jax.jit(
    lambda frozen, batch: task.parts.conditions(frozen, batch, align=True)
  )
  with jax.set_mesh(mesh):
    text = features.lower(dict(task.frozen), batch).compile().as_text()
  for exchange in ('all-to-all', 'collective-permute', 'all-gather'):
    assert f' {exchange}(' not in text
