"""What a chip can do, and which chips a topology has.

In: a topology such as `v5e:4x4`, and changed fields for another chip. Out: a
`Topology` of `Chip`s. Called by `scar plan`.
Sources: Cloud TPU documentation (docs.cloud.google.com/tpu/docs, pages v4, v5e,
v5p, v6e) for peak FLOPs, HBM and data-centre network; "How to Scale Your Model"
(jax-ml.github.io/scaling-book/tpus) for the bandwidth of one link. The HBM that
a program may use is what the compiler says when a program does not fit.
"""

import dataclasses
import math
import re
from typing import Any

from scar_jax.config_values import nearest, number, read_section

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip; rates are per second.

  Attributes:
    name: of the generation, as in `v5e:4x4`.
    flops: peak of bfloat16 matrix products.
    hbm: bytes that a program may use; less than is built in.
    hbm_bandwidth: bytes.
    link_bandwidth: bytes in one direction of one link between neighbours.
    torus: axes of the interconnect.
    ring: chips from which on an axis closes to a ring; shorter ones are lines.
    ring_multiple: an axis of a multiple of this closes too; 0 is none.
    dcn_bandwidth: bytes between slices, this chip's share of its host's.
  """

  name: str = 'v5e'
  flops: float = number(1.97e14, 1.0)
  hbm: int = number(int(15.75 * GIB), 1)
  hbm_bandwidth: float = number(8.19e11, 1.0)
  link_bandwidth: float = number(4.5e10, 1.0)
  torus: int = number(2, 1, 3)
  ring: int = number(16, 2)
  ring_multiple: int = number(0, 0)
  dcn_bandwidth: float = number(3.125e9, 1.0)

  def closes(self, size: int) -> bool:
    """An axis of so many chips is a ring."""
    multiple = self.ring_multiple
    return size >= self.ring or bool(multiple and size % multiple == 0)


CHIPS: dict[str, Chip] = {
  'v4': Chip(
    'v4', flops=2.75e14, hbm=int(30.75 * GIB), hbm_bandwidth=1.2e12,
    link_bandwidth=4.5e10, torus=3, ring=16, ring_multiple=4,
    dcn_bandwidth=7.8e8,
  ),
  'v5e': Chip('v5e'),
  'v5p': Chip(
    'v5p', flops=4.59e14, hbm=int(95.74 * GIB), hbm_bandwidth=2.765e12,
    link_bandwidth=9e10, torus=3, ring=16, ring_multiple=4,
    dcn_bandwidth=6.25e9,
  ),
  'v6e': Chip(
    'v6e', flops=9.18e14, hbm=int(31.25 * GIB), hbm_bandwidth=1.64e12,
    link_bandwidth=9e10, torus=2, ring=16, dcn_bandwidth=1.25e10,
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice, or several of them.

  Attributes:
    chip: of all.
    sides: chips along each axis of a slice.
    slices: how many.
  """

  chip: Chip
  sides: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    """All of them."""
    return math.prod(self.sides) * self.slices

  @property
  def name(self) -> str:
    """As it is written on the command line."""
    text = f'{self.chip.name}:{"x".join(map(str, self.sides))}'
    return text if self.slices == 1 else f'{text}*{self.slices}'


def read_topology(text: str, changes: str = '') -> Topology:
  """A topology from a command line.

  Args:
    text: `v5e:4x4`, `v5p:4x4x4`; `v5e:16x16*2` is two slices.
    changes: fields of `Chip` that differ, `hbm=34359738368,flops=5e14`.

  Raises:
    ValueError: another form, an unknown chip or field, a wrong number of axes.
  """
  where = '(set --topology, such as v5e:4x4 or v5p:4x4x4)'
  found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?', text.strip())
  if not found:
    raise ValueError(f'topology={text!r}; accepted: CHIP:AxB or AxBxC {where}')
  name, sides, slices = found.groups()
  if name not in CHIPS:
    raise ValueError(
      f'topology={text!r}: no chip {name!r}.{nearest(name, CHIPS)} '
      f'accepted: {", ".join(CHIPS)} {where}'
    )
  chip = _changed(CHIPS[name], changes)
  axes = tuple(int(side) for side in sides.split('x'))
  if len(axes) != CHIPS[name].torus or min(axes) < 1:
    raise ValueError(
      f'topology={text!r} has {len(axes)} axes; accepted: '
      f'{CHIPS[name].torus} of 1 or more chips for {name} {where}'
    )
  return Topology(chip, axes, max(int(slices or 1), 1))


def _changed(chip: Chip, changes: str) -> Chip:
  values: dict[str, Any] = dataclasses.asdict(chip)
  for part in filter(None, changes.split(',')):
    field, sep, value = part.partition('=')
    if not sep or field in ('name', 'torus'):
      raise ValueError(
        f'chip={part!r}; accepted: field=value of '
        f'{", ".join(k for k in values if k not in ("name", "torus"))} '
        '(set --chip)'
      )
    values[field] = value
  return read_section('chip', Chip, values)
