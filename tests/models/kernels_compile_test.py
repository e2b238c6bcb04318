"""Attention through the real TPU compiler, for described chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from scar_jax.models.attention import attend
from scar_jax.models.kernels import splash_attention
from scar_jax.orders.layout import make_layout, set_mask
from scar_jax.orders.raster import RasterOrder
from scar_jax.sharding import batch_sharding, make_mesh, platform

pytest.importorskip('libtpu', reason='no TPU compiler: install scar_jax[tpu]')
LAYOUT = make_layout(RasterOrder((16, 16)), (8, 8), 20)


def _plain(q, k, v, scale, valid, *, set_ids, padding):
  del padding
  return attend(q, k, v, set_mask(set_ids, set_ids, valid), scale)


@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1'])
@pytest.mark.parametrize('kernel', [_plain, splash_attention])
def test_forward_and_backward_compile_on_a_mesh(monkeypatch, topology, kernel):
  """Heads of 64 and 100 channels (XL and 3B), text padding, 2 x 2 devices."""
  # Described chips: no metadata server to ask, no device to lock.
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  chips = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  sets = dict(
    set_ids=LAYOUT.set_ids, padding=(LAYOUT.prefix_len, LAYOUT.set0_len)
  )

  def loss(q, k, v, valid):
    assert platform() == 'tpu'
    out = kernel(q, k, v, 0.1, valid, **sets)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  mesh = make_mesh({'fsdp': 2, 'tensor': 2, 'data': 1}, chips.devices)
  rows = batch_sharding(mesh)
  valid = jax.ShapeDtypeStruct((2, LAYOUT.length), np.bool_, sharding=rows)
  with jax.set_mesh(mesh):
    for channels in (64, 100) if kernel is splash_attention else (64,):
      shape = (2, LAYOUT.length, 2, channels)
      x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
      step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
      text = step.lower(x, x, x, valid).compile().as_text()
      kernels = text.count('custom_call_target="tpu_custom_call"')
      assert kernels == (3 if kernel is splash_attention else 0)
