"""Counts over compiled modules: FLOPs by trips, bytes, exchanges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scar_jax.plan.chips import CHIPS
from scar_jax.plan.collectives import Collective
from scar_jax.plan.costs import count
from scar_jax.plan.hlo import parse
from scar_jax.plan.roofline import bandwidth, roofline

ONE = {'data': 1}


def _module(function, *shapes, dtype=jnp.float32, **jit):
  given = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
  return jax.jit(function, **jit).lower(*given).compile()


def _flops(function, *shapes):
  return count(parse(_module(function, *shapes).as_text()), ONE).flops


def test_a_matrix_product_counts_as_xla_counts_it():
  def product(a, b):
    return jnp.einsum('bik,bkj->bij', a, b)

  compiled = _module(product, (3, 8, 16), (3, 16, 4))
  found = count(parse(compiled.as_text()), ONE).flops
  assert found == 2 * 3 * 8 * 16 * 4 == compiled.cost_analysis()['flops']


@pytest.mark.parametrize(
  ('stride', 'pad', 'dilate', 'groups'),
  [(1, 1, 1, 1), (2, 1, 1, 1), (1, 0, 2, 1), (2, 3, 3, 2)],
)
def test_a_convolution_counts_what_xla_counts(stride, pad, dilate, groups):
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      ((pad, pad), (pad, pad)),
      lhs_dilation=(dilate, dilate),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  compiled = _module(convolve, (2, 9, 9, 4), (3, 3, 4 // groups, 6))
  found = count(parse(compiled.as_text()), ONE).flops
  assert found == compiled.cost_analysis()['flops']


def test_the_body_of_a_loop_counts_by_its_trips():
  def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  def unrolled(x, weights):
    for w in weights:
      x = jnp.tanh(x @ w)
    return x

  shapes = ((8, 32), (5, 32, 32))
  assert _flops(layers, *shapes) == _flops(unrolled, *shapes)
  assert _flops(layers, *shapes) == 5 * 2 * 8 * 32 * 32
  once = _module(layers, *shapes).cost_analysis()['flops']
  assert once < 2 * 2 * 8 * 32 * 32  # why there is a count of our own


def test_a_loop_of_unknown_length_is_named():
  def search(x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: x @ x + 1, x)

  assert count(parse(_module(search, (4, 4)).as_text()), ONE).unknown_loops == 1


@pytest.mark.parametrize(
  ('first', 'step', 'bound', 'trips'),
  [(0, 1, 5, 5), (0, 2, 8, 4), (1, 3, 8, 3)],
)
def test_steps_of_a_loop_need_not_be_one(first, step, bound, trips):
  text = f"""%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %p = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4] get-tuple-element(%p), index=1
  %more = s32[] constant({step})
  %next = s32[] add(%i, %more)
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={{1}}
  ROOT %t = (s32[], f32[4,4]) tuple(%next, %y)
}}

%condition (p: (s32[], f32[4,4])) -> pred[] {{
  %p = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant({bound})
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}}

ENTRY %main (x: f32[4,4]) -> (s32[], f32[4,4]) {{
  %x = f32[4,4] parameter(0)
  %first = s32[] constant({first})
  %start = (s32[], f32[4,4]) tuple(%first, %x)
  ROOT %w = (s32[], f32[4,4]) while(%start), condition=%condition, body=%body
}}
"""
  assert count(parse(text), ONE).flops == trips * 2 * 4**3


def test_of_stacked_weights_a_step_reads_its_own():
  def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  found = count(parse(_module(layers, (8, 64), (50, 64, 64)).as_text()), ONE)
  stack = 50 * 64 * 64 * 4
  # Written once more where the slice is an instruction of its own.
  assert stack <= found.bytes < 4 * stack
  assert stack / 50 <= found.turn_bytes() < 4 * stack / 50


_AXES = {'data': 2, 'fsdp': 4}


def _exchanges(function, *specs):
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), tuple(_AXES))
  places = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
  given = [
    jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=p) for p in places[:-1]
  ]
  lowered = jax.jit(function, out_shardings=places[-1]).lower(*given)
  return count(parse(lowered.compile().as_text()), _AXES).collectives


def test_exchanges_are_told_with_axis_and_bytes():
  (gather,) = _exchanges(lambda x: x * 2, ('fsdp',), ())
  assert (gather.kind, gather.axes) == ('all-gather', ('fsdp',))
  assert gather.group == 4
  assert gather.bytes == 16 * 16 * 4 / 4
  assert gather.sent == 3 * gather.bytes

  (reduce,) = _exchanges(lambda a, b: a @ b, (None, 'data'), ('data', None), ())
  assert (reduce.kind, reduce.axes) == ('all-reduce', ('data',))
  assert reduce.sent == reduce.bytes == 16 * 16 * 4


def test_both_ways_of_writing_groups_mean_the_same():
  text = """ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%x), replica_groups={}, to_apply=%add
}}
"""
  listed = '{{0,4},{1,5},{2,6},{3,7}}'
  iota = '[4,2]<=[2,4]T(1,0)'
  for groups in (listed, iota):
    (found,) = count(parse(text.format(groups)), _AXES).collectives
    assert found.axes == ('data',)
    assert found.members == (0, 4)


def test_a_started_exchange_overlaps():
  text = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8]{0:T(128)} parameter(0)
  %s = (f32[8]{0}, f32[32]{0:T(128)S(1)}) all-gather-start(%x), """
  text += """replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %d = f32[32]{0} all-gather-done(%s)
}
"""
  (found,) = count(parse(text), _AXES).collectives
  assert found.overlaps
  tile = 128 * 4  # which moves as a whole
  assert (found.kind, found.axes) == ('all-gather', ('fsdp',))
  assert found.bytes == tile


def test_no_entry_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    parse('HloModule x\n')


V5E = CHIPS['v5e']
SQUARE = [(0, x, y, 0) for x in range(4) for y in range(4)]
POD = [(0, x, y, 0) for x in range(16) for y in range(16)]


def test_bandwidth_follows_the_torus():
  link = V5E.link_bandwidth
  row, square = range(4), range(16)
  assert bandwidth(row, V5E, SQUARE) == link  # a line
  assert bandwidth(square, V5E, SQUARE) == 2 * link
  assert bandwidth(range(16), V5E, POD) == 2 * link  # a ring
  assert bandwidth(range(256), V5E, POD) == 4 * link
  assert bandwidth(range(8), V5E, POD) == link  # a part of one
  two = [(0, 0, 0, 0), (1, 0, 0, 0)]
  assert bandwidth((0, 1), V5E, two) == V5E.dcn_bandwidth


def test_what_overlaps_runs_beside_and_the_rest_between():
  costs = count(parse(_module(jnp.matmul, (8, 8), (8, 8)).as_text()), ONE)
  base = roofline(costs, V5E, SQUARE)
  seconds = {}
  for overlaps in (True, False):
    exchange = Collective('all-gather', ('fsdp',), 3e9, 4, 2, overlaps, (0, 1))
    more = type(costs)(costs.ops, (exchange,), 0)
    line = roofline(more, V5E, SQUARE)
    assert line.binds == 'interconnect'
    assert line.interconnect == pytest.approx(2 * 9e9 / V5E.link_bandwidth)
    seconds[overlaps] = line.step
  assert seconds[True] == pytest.approx(line.interconnect)
  assert seconds[False] == pytest.approx(line.interconnect + base.step)


@pytest.mark.parametrize('beside', [True, False])
def test_a_copy_that_is_started_ahead_runs_beside_other_work(beside):
  """Its bytes are moved all the same, and HBM can become what binds."""
  lines = [
    '%s = (f32[64,64]{1,0:S(1)}, f32[64,64]{1,0}, u32[]{:S(2)}) copy-start(%w)',
    '%y = f32[64,4096]{1,0:S(1)} dot(%x, %x), lhs_contracting_dims={0}, '
    'rhs_contracting_dims={0}',
    '%d = f32[64,64]{1,0:S(1)} copy-done(%s)',
  ]
  if not beside:
    lines = [lines[1], lines[0], lines[2]]
  body = '\n  '.join(lines)
  text = f"""ENTRY %main (x: f32[64,64], w: f32[64,64]) -> f32[64,64] {{
  %x = f32[64,64]{{1,0:S(1)}} parameter(0)
  %w = f32[64,64]{{1,0}} parameter(1)
  {body}
  ROOT %r = f32[64,64]{{1,0:S(1)}} add(%d, %d)
}}
"""
  costs = count(parse(text), ONE)
  [copy] = [op for op in costs.ops if op.opcode == 'copy-start']
  assert (copy.beside, costs.bytes) == (beside, 64 * 64 * 4)
  fast = dataclasses.replace(V5E, flops=costs.flops / 3, hbm_bandwidth=2**13)
  step = roofline(costs, fast, SQUARE).step
  assert step == pytest.approx(3 if beside else 3 + 2)
  slow = dataclasses.replace(fast, hbm_bandwidth=2**11)
  assert roofline(costs, slow, SQUARE).step == pytest.approx(
    8 + 3 * (not beside)
  )


def test_an_exchange_in_several_fusions_counts_once():
  gather = (
    'all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, '
    'frontend_attributes={chain_id="3"}'
  )
  text = f"""%start (p: f32[8]) -> f32[32] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %g.1 = f32[32]{{0}} {gather}
}}

%beside (p: f32[8]) -> f32[32] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %g.2 = f32[32]{{0}} {gather}
}}

%scatter (p: f32[32]) -> f32[8] {{
  %p = f32[32]{{0}} parameter(0)
  %zero = s32[] constant(0)
  %r = f32[32]{{0}} all-reduce(%p), channel_id=8, replica_groups=[2,4]<=[8]
  ROOT %s = f32[8]{{0}} dynamic-slice(%r, %zero), dynamic_slice_sizes={{8}}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %a = f32[32]{{0}} fusion(%x), kind=kCustom, calls=%start
  %b = f32[32]{{0}} fusion(%x), kind=kOutput, calls=%beside
  ROOT %c = f32[8]{{0}} fusion(%b), kind=kCustom, calls=%scatter
}}
"""
  gathered, scattered = count(parse(text), _AXES).collectives
  assert (gathered.kind, gathered.overlaps, gathered.bytes) == (
    'all-gather', True, 32,
  )  # fmt: skip
  assert (scattered.kind, scattered.overlaps) == ('reduce-scatter', False)
  assert scattered.sent == 128 * 3 / 4


def test_a_started_slice_moves_the_slice_alone():
  text = """ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %s = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)
  ROOT %d = f32[2,4]{1,0:S(1)} slice-done(%s)
}
"""
  assert count(parse(text), ONE).bytes == 2 * 4 * 4


def test_buffers_that_are_handed_on_move_nothing():
  text = """%beside (p: f32[8], q: f32[32], a: f32[64]) -> (f32[64], f32[32]) {
  %p = f32[8]{0} parameter(0)
  %q = f32[32]{0} parameter(1)
  %a = f32[64]{0} parameter(2)
  %g = f32[32]{0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8]
  %b = f32[64]{0} add(%a, %a)
  ROOT %t = (f32[64]{0}, f32[32]{0}) tuple(%b, %q)
}

ENTRY %main (x: f32[8], y: f32[32], z: f32[64]) -> (f32[64], f32[32]) {
  %x = f32[8]{0} parameter(0)
  %y = f32[32]{0} parameter(1)
  %z = f32[64]{0} parameter(2)
  ROOT %f = (f32[64]{0}, f32[32]{0}) fusion(%x, %y, %z), calls=%beside
}
"""
  assert count(parse(text), _AXES).bytes == 2 * 64 * 4


def test_a_fusion_in_a_fusion_reads_its_slice_and_writes_its_update():
  text = """%slice (p: f32[50,4,8], i: s32[]) -> f32[4,8] {
  %p = f32[50,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = f32[1,4,8]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,4,8}
  ROOT %b = f32[4,8]{1,0} bitcast(%d)
}

%update (c: f32[50,2,8], u: f32[1,2,8], i: s32[]) -> f32[50,2,8] {
  %c = f32[50,2,8]{2,1,0} parameter(0)
  %u = f32[1,2,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %w = f32[50,2,8]{2,1,0} dynamic-update-slice(%c, %u, %i, %z, %z)
}

%step (p: f32[50,4,8], c: f32[50,2,8], x: f32[2,4], i: s32[]) -> f32[50,2,8] {
  %p = f32[50,4,8]{2,1,0} parameter(0)
  %c = f32[50,2,8]{2,1,0} parameter(1)
  %x = f32[2,4]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %w = f32[4,8]{1,0} fusion(%p, %i), kind=kLoop, calls=%slice
  %y = f32[2,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %u = f32[1,2,8]{2,1,0} bitcast(%y)
  ROOT %n = f32[50,2,8]{2,1,0} fusion(%c, %u, %i), kind=kLoop, calls=%update
}

ENTRY %main (p: f32[50,4,8], c: f32[50,2,8], x: f32[2,4], i: s32[]) -> f32[50,2,8] {
  %p = f32[50,4,8]{2,1,0} parameter(0)
  %c = f32[50,2,8]{2,1,0} parameter(1)
  %x = f32[2,4]{1,0} parameter(2)
  %i = s32[] parameter(3)
  ROOT %f = f32[50,2,8]{2,1,0} fusion(%p, %c, %x, %i), kind=kOutput, calls=%step
}
"""  # noqa: E501
  found = count(parse(text), ONE)
  assert found.flops == 2 * 2 * 4 * 8
  # One layer's weights, x and the counter; the update of two rows.
  assert found.bytes == 4 * (4 * 8 + 2 * 4 + 1) + 4 * 2 * 8


@pytest.mark.parametrize(
  ('shape', 'bytes'),
  [
    ('bf16[3,8,5,64]{3,1,2,0:T(8,128)(2,1)}', 3 * 8 * 5 * 128 * 2),
    ('bf16[3,5,8,64]{3,1,2,0:T(8,128)(2,1)}', 3 * 8 * 8 * 128 * 2),
    ('f32[5,200]{0,1:T(8,128)S(1)}', 128 * 200 * 4),
    ('f32[5,200]{1,0}', 5 * 200 * 4),
    ('f32[3]{0:T(8,128)}', 128 * 4),
    ('s32[300]{0:T(1024)}', 1024 * 4),
    ('f32[]{:T(128)}', 4),
  ],
)
def test_bytes_are_those_of_whole_tiles(shape, bytes):
  text = f'ENTRY %e () -> {shape} {{\n  ROOT %x = {shape} constant(0)\n}}\n'
  [found] = parse(text).computations['e']['x'].shapes
  assert found.bytes == bytes
