"""What scanned layers keep for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

from scar_jax.plan.activations import saved_bytes
from scar_jax.plan.hlo import parse

LAYERS, ROWS, WIDTH = 6, 16, 32


@pytest.mark.parametrize('remat', [True, False])
def test_what_a_scan_keeps_depends_on_the_policy(remat):
  def layer(x, w):
    return jnp.tanh(jnp.tanh(x @ w) @ w.T), None

  def loss(weights, x):
    body = jax.checkpoint(layer) if remat else layer
    return jnp.sum(jax.lax.scan(body, x, weights)[0])

  weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
  x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
  text = jax.jit(jax.grad(loss)).lower(weights, x).compile().as_text()
  one = LAYERS * ROWS * WIDTH * 4
  found = saved_bytes(parse(text))
  if remat:  # the inputs of layers alone
    assert found == one
  else:  # these, and the states within
    assert 3 * one <= found <= 8 * one


def test_a_loop_alone_keeps_nothing():
  def layers(x, weights):
    return jax.lax.scan(lambda x, w: (x @ w, x), x, weights)

  x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  weights = jax.ShapeDtypeStruct((5, 4, 4), jnp.float32)
  text = jax.jit(layers).lower(x, weights).compile().as_text()
  assert saved_bytes(parse(text)) == 0


def test_weights_that_pass_through_a_loop_are_none():
  loop = 'condition=%c, body=%b, backend_config={"known_trip_count":{"n":"6"}}'
  kind = '(f32[6,4], f32[6,8])'
  text = f"""ENTRY %main (w: f32[6,4]) -> {kind} {{
  %w = f32[6,4] parameter(0)
  %zero = f32[] constant(0)
  %new = f32[6,8] broadcast(%zero), dimensions={{}}
  %start = {kind} tuple(%w, %new)
  %forward = {kind} while(%start), {loop}
  %kept = f32[6,8] get-tuple-element(%forward), index=1
  %copy = f32[6,8] copy(%kept)
  %same = f32[6,4] get-tuple-element(%forward), index=0
  %next = {kind} tuple(%same, %copy)
  ROOT %backward = {kind} while(%next), {loop}
}}
"""
  assert saved_bytes(parse(text)) == 6 * 8 * 4
