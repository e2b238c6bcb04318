"""Schedules, decay, groups and Muon's matrices, in numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scar_jax.config import OptimConfig
from scar_jax.sharding import annotated, unbox
from scar_jax.train.optim import (
  decay_mask,
  learning_rate,
  make_optimizer,
  muon_axes,
)


def _boxed(**leaves):
  """name -> (shape, logical axes)."""
  key = jax.random.key(0)
  init = jax.nn.initializers.normal(1.0)
  return {
    name: {'kernel': annotated(init, *axes)(key, shape)}
    for name, (shape, axes) in leaves.items()
  }


@pytest.fixture
def boxed():
  return _boxed(
    qkv=((2, 8, 3, 2, 4), ('layers', 'embed', None, 'heads', 'head_dim')),
    out=((2, 2, 4, 8), ('layers', 'heads', 'head_dim', 'embed')),
    head=((8, 16), ('embed', 'vocab')),
    norm=((2, 8), ('layers', None)),
    conv=((3, 3, 8, 8), (None, None, None, 'conv_out')),
  )


@pytest.mark.parametrize('groups', [False, True])
def test_a_norm_that_is_known_serves_the_clip_of_all(boxed, groups):
  cfg = OptimConfig(name='adamw', clip=1.0, b1=0.0, group_lr=())
  params = jax.tree.map(lambda x: jnp.ones(x.shape), unbox(boxed))
  labels = jax.tree.map(lambda _: 'main', params)
  if groups:
    first = next(iter(labels))
    labels[first] = jax.tree.map(lambda _: 'other', labels[first])
  tx = make_optimizer(cfg, 100, boxed, labels)
  tx = optax.with_extra_args_support(tx)

  def moments(**known):
    _, state = tx.update(params, tx.init(params), params, **known)
    found = [
      x
      for path, x in jax.tree_util.tree_leaves_with_path(state)
      if 'mu' in jax.tree_util.keystr(path)
    ]
    return sum(float(jnp.sum(x)) for x in found)

  # Each group has a norm of its own, which is not that of all.
  norm = optax.tree.norm(params)
  assert moments(norm=norm) == pytest.approx(moments())
  ratio = moments(norm=2 * norm) / moments()
  assert ratio == pytest.approx(1.0 if groups else 0.5)


@pytest.mark.parametrize(
  ('schedule', 'values'),
  [
    ('constant', {0: 0.1, 5: 0.55, 10: 1.0, 60: 1.0, 109: 1.0}),
    ('cosine', {0: 0.1, 10: 1.0, 59: 0.6071, 109: 0.2}),
    ('lin0', {10: 1.0, 14: 1.0, 59: 0.6253, 109: 0.2}),
  ],
)
def test_schedules_at_their_corners(schedule, values):
  cfg = OptimConfig(
    lr=1.0, schedule=schedule, warmup_steps=10, warmup_start=0.1, end_scale=0.2
  )
  rate = learning_rate(cfg, 110)
  for step, want in values.items():
    assert float(rate(step)) == pytest.approx(want, abs=2e-3), step


def test_warmup_longer_than_the_run_is_an_error():
  with pytest.raises(ValueError, match=r'warmup_steps=20 is above'):
    learning_rate(OptimConfig(warmup_steps=20), 10)


def test_decay_spares_vectors_also_stacked_ones(boxed):
  mask = jax.tree.map(bool, decay_mask(boxed))
  decays = {name: leaf['kernel'] for name, leaf in mask.items()}
  assert decays == {
    'qkv': True, 'out': True, 'head': True, 'norm': False, 'conv': True,
  }  # fmt: skip


def test_muon_takes_the_linear_maps_only(boxed):
  axes = {name: leaf['kernel'] for name, leaf in muon_axes(boxed).items()}
  # Layers, and query, key, value, are matrices side by side.
  assert (axes['qkv'].reduction_axis, axes['qkv'].output_axis) == ((1,), (3, 4))
  assert (axes['out'].reduction_axis, axes['out'].output_axis) == ((1, 2), (3,))
  assert axes['head'] is axes['norm'] is axes['conv'] is None


def test_muon_steps_are_orthogonal_and_as_large_as_adamw(boxed):
  params = unbox(boxed)
  grads = jax.tree.map(jnp.sin, params)
  updates = {}
  for name in ('adamw', 'muon'):
    cfg = OptimConfig(name=name, lr=1e-2, weight_decay=0.0, clip=0.0)
    tx = make_optimizer(cfg, 10, boxed)
    updates[name], _ = tx.update(grads, tx.init(params), params)
  matrix = np.asarray(updates['muon']['out']['kernel'][0]).reshape(8, 8)
  scale = np.linalg.svd(matrix)[1]
  assert scale.max() / scale.min() < 2  # five Newton-Schulz steps
  before = np.asarray(grads['out']['kernel'][0]).reshape(8, 8)
  before = np.linalg.svd(before)[1]
  assert before.max() / before.min() > 5
  rms = {
    name: float(jnp.sqrt(jnp.mean(jnp.square(found['qkv']['kernel']))))
    for name, found in updates.items()
  }
  assert rms['muon'] == pytest.approx(0.2 * rms['adamw'], rel=0.25)
  # What is left to AdamW has the momentum of Nesterov there, as Muon has.
  rest = optax.adamw(1e-2, 0.9, 0.95, weight_decay=0.0, nesterov=True)
  want, _ = rest.update(grads, rest.init(params), params)
  for name in ('head', 'norm', 'conv'):
    np.testing.assert_allclose(
      updates['muon'][name]['kernel'], want[name]['kernel'], rtol=1e-4
    )


def test_groups_have_their_rates_and_frozen_ones_stay(boxed):
  labels = {
    name: {'kernel': 'slow' if name == 'head' else 'main'} for name in boxed
  }
  cfg = OptimConfig(
    lr=1e-2, group_lr=(('slow', 1e-3),), freeze=('conv',), weight_decay=0.0
  )
  params = unbox(boxed)
  tx = make_optimizer(cfg, 10, boxed, labels)
  updates, state = tx.update(
    jax.tree.map(jnp.ones_like, params), tx.init(params), params
  )
  step = {k: float(jnp.abs(v['kernel']).mean()) for k, v in updates.items()}
  assert step['out'] == pytest.approx(1e-2, rel=1e-3)
  assert step['head'] == pytest.approx(1e-3, rel=1e-3)
  assert step['conv'] == 0
  moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1)
  moving = sum(
    leaf['kernel'].size for name, leaf in params.items() if name != 'conv'
  )
  assert moments == 2 * moving


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'freeze': ('cnov',)}, r"optim\.freeze='cnov' matches none"),
    ({'group_lr': (('fast', 1.0),)}, r"names \['fast'\]; the groups are"),
  ],
)
def test_names_that_match_nothing_are_errors(boxed, fields, message):
  with pytest.raises(ValueError, match=message):
    make_optimizer(OptimConfig(**fields), 10, boxed)


@pytest.mark.parametrize('limit', [0.5, 50.0])
def test_updates_are_those_of_optax(boxed, limit):
  params = unbox(boxed)
  grads = jax.tree.map(jnp.cos, params)
  cfg = OptimConfig(lr=1e-3, weight_decay=0.1, clip=limit)
  tx = make_optimizer(cfg, 10, boxed)
  want = optax.chain(
    optax.clip_by_global_norm(limit),
    optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.1, mask=decay_mask(boxed)),
  )
  got, state = tx.update(grads, tx.init(params), params)
  expected, wanted = want.update(grads, want.init(params), params)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(close, got, expected)
  # Adam's first update is blind to the size of gradients, its moments are not.
  mu = (optax.tree.get(tree, 'mu') for tree in (state, wanted))
  jax.tree.map(close, *mu)
