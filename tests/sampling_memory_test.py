"""The sampler's memory, by the compiler's count."""

import jax
import pytest

from scar_jax.bench import orders
from scar_jax.filters import SamplerConfig
from scar_jax.models.blocks import queries_at_once
from scar_jax.models.decoder import decoder_size
from scar_jax.orders.scale import scale_sides
from scar_jax.sampling_loop import cache_size
from scar_jax.sampling_steps import sampling_order

SIDE, BATCH, BRANCHES = 8, 4, 2


@pytest.mark.parametrize(
  ('order', 'side'),
  [
    *(('raster', SIDE), ('random', SIDE), ('scale', SIDE)),
    *(('raster', 16), ('random', 16), ('scale', 16)),
  ],
)
def test_the_peak_is_weights_cache_and_what_a_set_needs(order, side):
  decoder = decoder_size('small')
  sides = scale_sides(side) if order == 'scale' else ()
  cfg = orders._config(order, decoder, side, sides)
  sampler = SamplerConfig(guidance=3.0, num_sets=8 if order == 'random' else 0)
  call = orders._sampling(cfg, sampler, BATCH)
  used = call.func.lower(*call.args).compile().memory_analysis()
  peak = used.argument_size_in_bytes + used.temp_size_in_bytes

  weights = sum(x.nbytes for x in jax.tree.leaves(call.args[0]))
  rows, plan = BATCH * BRANCHES, sampling_order(cfg, sampler)
  slots = cache_size(cfg.make_layout().set0_len + plan.input_len)
  layer = 2 * rows * slots * decoder.width * 4
  cache = decoder.layers * layer
  # Of both branches, beside those they are mixed to.
  logits = (BRANCHES + 1) * BATCH * max(plan.set_sizes) * decoder.vocab * 4
  # The random order sees the set before, and asks for the next.
  queries = max(plan.set_sizes) * (2 if order == 'random' else 1)
  attention = rows * decoder.heads * min(queries, queries_at_once()) * slots * 4
  assert used.temp_size_in_bytes > cache  # or it is not what is measured
  # Keys and values of one layer are attended to heads first.
  assert peak < 1.2 * (weights + cache + layer + attention + logits)


def test_set_0_is_filled_without_the_slots_that_follow():
  cfg = orders._config('raster', decoder_size('tiny'), SIDE)
  call = orders._sampling(cfg, SamplerConfig(guidance=3.0), BATCH)
  start = cfg.make_layout().set0_len
  text = call.func.lower(*call.args).as_text()
  heads = decoder_size('tiny').heads
  rows = BATCH * BRANCHES
  shape = 'tensor<{}x{}x{}x{}xf32>'
  assert shape.format(rows, heads, start, start) in text
  whole = cache_size(start + SIDE * SIDE - 1)
  assert shape.format(rows, heads, start, whole) not in text
