"""Topologies as they are written, and chips of another kind."""

import pytest

from scar_jax.plan.chips import CHIPS, read_topology


@pytest.mark.parametrize(
  ('text', 'chips', 'slices'),
  [('v5e:16x16', 256, 1), ('v5p:4x4x4', 64, 1), ('v6e:2x4*3', 24, 3)],
)
def test_a_topology_is_read_and_written(text, chips, slices):
  found = read_topology(text)
  assert (found.chips, found.slices, found.name) == (chips, slices, text)


def test_fields_of_a_chip_may_be_changed():
  found = read_topology('v5e:4x4', 'flops=4e14,hbm=123')
  assert (found.chip.flops, found.chip.hbm) == (4e14, 123)
  assert found.chip.hbm_bandwidth == CHIPS['v5e'].hbm_bandwidth


def test_only_whole_axes_of_a_torus_are_rings():
  assert not CHIPS['v5e'].closes(8)
  assert CHIPS['v5e'].closes(16)
  assert CHIPS['v5p'].closes(4)
  assert not CHIPS['v5p'].closes(2)


@pytest.mark.parametrize(
  ('text', 'changes', 'message'),
  [
    ('v5e', '', "topology='v5e'; accepted: CHIP:AxB"),
    ('v7:4x4', '', "no chip 'v7'. Did you mean"),
    ('v5e:4x4x4', '', 'has 3 axes; accepted: 2 of 1 or more chips for v5e'),
    ('v5p:4x4', '', 'has 2 axes; accepted: 3'),
    ('v5e:4x4', 'speed=3', "no field 'chip.speed'"),
    ('v5e:4x4', 'flops', "chip='flops'; accepted: field=value of flops, hbm"),
    ('v5e:4x4', 'hbm=0', 'chip.hbm=0 is below the least accepted'),
  ],
)
def test_what_is_no_topology_is_an_error(text, changes, message):
  with pytest.raises(ValueError) as error:
    read_topology(text, changes)
  assert message in str(error.value)
