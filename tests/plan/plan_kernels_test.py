"""FLOPs of Pallas kernels from the traced program."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from scar_jax.plan.costs import count
from scar_jax.plan.hlo import parse
from scar_jax.plan.kernels import kernel_flops


def _product(x_ref, y_ref, o_ref):
  o_ref[...] = jnp.dot(x_ref[...], y_ref[...])


def test_a_kernel_counts_for_each_cell_of_its_grid():
  def call(x, y):
    tall = pl.BlockSpec((8, 16), lambda i: (i, 0))
    return pl.pallas_call(
      _product,
      grid=(4,),
      in_specs=[tall, pl.BlockSpec((16, 8), lambda i: (0, 0))],
      out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
      out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32),
      name='product',
    )(x, y)

  traced = jax.jit(call).trace(jnp.zeros((32, 16)), jnp.zeros((16, 8)))
  assert kernel_flops(traced.jaxpr) == {'product': 2 * 32 * 16 * 8}


@pytest.mark.parametrize('layers', [0, 3])
def test_tiles_that_a_mask_hides_do_not_count(layers):
  heads, length, dim, tile, batch = 2, 512, 128, 128, 3
  names = [f'block_{a}{b}' for a in ('q', 'kv') for b in ('', '_dkv', '_dq')]
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
  kernel = splash.make_splash_mha(
    mask,
    block_sizes=splash.BlockSizes(**dict.fromkeys(names, tile)),
    head_shards=1,
    q_seq_shards=1,
  )

  @functools.partial(jax.grad, argnums=(0, 1))
  def loss(q, k):
    @jax.checkpoint
    def layer(q, _):
      return jax.vmap(kernel)(q, k, k), None

    if not layers:
      return jnp.sum(layer(q, None)[0].astype(jnp.float32))
    return jnp.sum(jax.lax.scan(layer, q, length=layers)[0])

  shape = jax.ShapeDtypeStruct((batch, heads, length, dim), jnp.bfloat16)
  found = kernel_flops(jax.jit(loss).trace(shape, shape).jaxpr)
  seen = 10 / 16  # of the 4 x 4 tiles
  product = 2 * batch * heads * length**2 * dim * seen
  # Forward: q k, p v. Backward: twice q k and dp; then dv, dk and dq.
  assert found == {
    'splash_mha_fwd_residuals': 2 * product,
    'splash_mha_dkv_no_residuals': 4 * product,
    'splash_mha_dq_no_residuals': 3 * product,
  }


def test_calls_are_found_by_name_across_line_breaks():
  text = """ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %splash_fwd.1 = f32[8]{0} custom-call(%x), frontend_attributes={kernel={
"a":"b"
}}, metadata={op_name="jit(f)"}
  ROOT %splash_fwd.2 = f32[8]{0} custom-call(%splash_fwd.1)
}
"""
  found = count(parse(text), {'data': 1}, {'splash_fwd': 5.0})
  assert found.flops == found.kernel_flops == 10
  assert found.bytes == 2 * 2 * 8 * 4
