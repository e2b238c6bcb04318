"""How long a module must take on a chip: compute, HBM, interconnect.

In: `Costs`, a chip, the places of the devices in their torus. Out: a
`Roofline`. Each instruction takes the longer of its FLOPs at peak and its bytes
at full bandwidth. Copies into on-chip memory that were started ahead, and
exchanges that overlap, run beside all of them (but HBM moves all its bytes at
full bandwidth at best); other exchanges run between them. A bound, not a
forecast: no machine reaches all of its peaks.
"""

import dataclasses
import math
from collections.abc import Sequence

from scar_jax.plan.chips import Chip
from scar_jax.plan.collectives import Collective
from scar_jax.plan.costs import Costs

Coords = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of one run.

  Attributes:
    compute: all FLOPs at peak.
    hbm: all bytes of HBM at full bandwidth.
    interconnect: all exchanges.
    waiting: of these, what nothing overlaps.
    step: from start to end.
    binds: 'compute', 'hbm' or 'interconnect', the longest of them.
  """

  compute: float
  hbm: float
  interconnect: float
  waiting: float
  step: float
  binds: str


def roofline(costs: Costs, chip: Chip, coords: Coords) -> Roofline:
  """Bounds of one run.

  Args:
    costs: of one device.
    chip: that it runs on.
    coords: slice, then place in the torus, of each device in mesh order.
  """
  busy = sum(
    op.trips * max(op.flops / chip.flops, op.bytes / chip.hbm_bandwidth)
    for op in costs.ops
    if not op.beside
  )
  hidden = waiting = 0.0
  for exchange in costs.collectives:
    seconds = exchange.trips * exchange_seconds(exchange, chip, coords)
    if exchange.overlaps:
      hidden += seconds
    else:
      waiting += seconds
  times = {
    'compute': costs.flops / chip.flops,
    'hbm': costs.bytes / chip.hbm_bandwidth,
    'interconnect': hidden + waiting,
  }
  return Roofline(
    **times,
    waiting=waiting,
    step=max(busy, times['hbm'], hidden) + waiting,
    binds=max(times, key=lambda name: times[name]),
  )


def exchange_seconds(exchange: Collective, chip: Chip, coords: Coords) -> float:
  """Seconds of one exchange, its bytes spread over all axes that it uses."""
  if exchange.group < 2:
    return 0.0
  return exchange.sent / bandwidth(exchange.members, chip, coords)


def bandwidth(members: Sequence[int], chip: Chip, coords: Coords) -> float:
  """Bytes per second that each member of a group can send.

  A ring sends both ways at once; a line is as slow as its middle link, which
  all bytes of a direction cross. Between slices the network of the data centre
  is all there is.

  Args:
    members: positions in the mesh.
    chip: of all.
    coords: see `roofline`.
  """
  slices, *axes = zip(*(coords[m] for m in members), strict=True)
  if len(set(slices)) > 1:
    return chip.dcn_bandwidth
  ways = 0
  for axis, place in enumerate(axes, 1):
    if len(set(place)) > 1:
      side = max(place[axis] for place in coords) + 1
      whole = max(place) - min(place) + 1 == side
      ways += 2 if whole and chip.closes(side) else 1
  return chip.link_bandwidth * max(ways, 1)


def utilisation(flops: float, seconds: float, chips: int, chip: Chip) -> float:
  """Model-FLOPs utilisation if a step took so long; at most 1."""
  return (
    min(flops / (seconds * chips * chip.flops), 1.0) if seconds else (math.nan)
  )
