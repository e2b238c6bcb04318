"""Attention through the real TPU compiler, for described chips."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from scar_jax.models.attention import attend, attend_slots
from scar_jax.models.cache import empty_cache, write_layer
from scar_jax.models.kernels import splash_attention
from scar_jax.orders.layout import make_layout, set_mask
from scar_jax.orders.raster import RasterOrder
from scar_jax.sharding import (
  batch_sharding,
  logical_spec,
  make_mesh,
  platform,
)

pytest.importorskip('libtpu', reason='no TPU compiler: install scar_jax[tpu]')
LAYOUT = make_layout(RasterOrder((16, 16)), (8, 8), 20)


def _plain(q, k, v, scale, valid, *, set_ids, padding):
  del padding
  return attend(q, k, v, set_mask(set_ids, set_ids, valid), scale)


def _devices(monkeypatch, topology):
  # Described chips: no metadata server to ask, no device to lock.
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  return topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices


@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1'])
@pytest.mark.parametrize('kernel', [_plain, splash_attention])
def test_forward_and_backward_compile_on_a_mesh(monkeypatch, topology, kernel):
  """Heads of 64 and 100 channels (XL and 3B), text padding, 2 x 2 devices."""
  devices = _devices(monkeypatch, topology)
  sets = dict(
    set_ids=LAYOUT.set_ids, padding=(LAYOUT.prefix_len, LAYOUT.set0_len)
  )

  def loss(q, k, v, valid):
    assert platform() == 'tpu'
    out = kernel(q, k, v, 0.1, valid, **sets)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  mesh = make_mesh({'fsdp': 2, 'tensor': 2, 'data': 1}, devices)
  rows = batch_sharding(mesh)
  valid = jax.ShapeDtypeStruct((2, LAYOUT.length), np.bool_, sharding=rows)
  with jax.set_mesh(mesh):
    for channels in (64, 100) if kernel is splash_attention else (64,):
      shape = (2, LAYOUT.length, 2, channels)
      x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
      step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
      text = step.lower(x, x, x, valid).compile().as_text()
      if kernel is splash_attention:  # which then reads whole tiles
        assert f'bf16[1,{channels},384]{{2,1,0' in text
      kernels = text.count('custom_call_target="tpu_custom_call"')
      assert kernels == (3 if kernel is splash_attention else 0)


def test_a_cache_fills_its_tiles(monkeypatch):
  """Tiles are 128 wide: with heads of 64 channels last, it took twice as much.

  And each device keeps its own rows and heads.
  """
  devices = _devices(monkeypatch, 'v5e:2x2')
  mesh = make_mesh({'fsdp': 2, 'tensor': 2, 'data': 1}, devices)

  def sample(x):
    def step(carry, at):
      x, caches = carry

      def layer(carry, layer):
        x, caches = carry
        both = [write_layer(kv, x, layer, at) for kv in caches]
        (k_all, k), (v_all, v) = both
        seen = (jnp.arange(256) <= at)[None, None]
        return (attend_slots(x, k, v, seen, 0.1), (k_all, v_all)), None

      return jax.lax.scan(layer, (x, caches), jnp.arange(3))[0], None

    cache = empty_cache(3, 8, 256, 4, 64, 'bfloat16')
    return jax.lax.scan(step, (x, (cache.k, cache.v)), jnp.arange(256))[0][0]

  with jax.set_mesh(mesh):
    spec = logical_spec(
      ('batch', None, 'act_heads', None), (8, 1, 4, 64), mesh.shape
    )
    place = jax.sharding.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((8, 1, 4, 64), jnp.bfloat16, sharding=place)
    text = jax.jit(sample).lower(x).compile().as_text()
  found = re.findall(r'bf16\[3,(\d+),(\d+),64,256\]\{([\d,]+)', text)
  assert set(found) == {('4', '2', '4,3,2,1,0')}
