"""Exchanges between devices: which, how much, over which axes of the mesh.

In: an instruction of `hlo.py`. Out: a `Collective`. Groups come as lists or as
an iota that is reshaped and transposed; both are positions in the mesh. Called
by `costs.py`; `roofline.py` turns bytes into time.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from scar_jax.plan.hlo import Computation, Instruction

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)

_AXIS = re.compile(r"'([^']+)'=(\d+)")
_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True, eq=False)
class Collective:
  """One exchange between devices.

  Attributes:
    kind: a value of `COLLECTIVES`.
    axes: of the mesh, over which it goes.
    bytes: that a device hands in, each time.
    group: devices that take part in each.
    trips: how often it runs.
    overlaps: other work runs meanwhile: start and done are apart, or it is
      fused with matrix products.
    members: one group, as positions in the mesh.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: float
  group: int
  trips: int
  overlaps: bool
  members: tuple[int, ...] = ()

  @property
  def sent(self) -> float:
    """Bytes that each device sends each time, round a ring."""
    n = max(self.group, 1)
    return self.bytes * {
      'all-gather': n - 1,
      'all-reduce': 2 * (n - 1) / n,
      'reduce-scatter': (n - 1) / n,
      'all-to-all': (n - 1) / n,
    }.get(self.kind, 1)


def exchange(
  i: Instruction,
  kind: str,
  inside: Computation,
  mesh: Mapping[str, int],
  trips: int,
  overlaps: bool,
) -> Collective:
  """The exchange that an instruction makes.

  Args:
    i: the instruction, or the start of an asynchronous one.
    kind: a value of `COLLECTIVES`.
    inside: its computation.
    mesh: axis -> size, in the order of the devices.
    trips: how often it runs.
    overlaps: other work runs meanwhile.
  """
  groups = _groups(i, math.prod(mesh.values()))
  operands = [inside[name] for name in i.operands if name in inside]
  return Collective(
    kind=kind,
    axes=_axes(groups, mesh),
    bytes=sum(s.bytes for o in operands for s in o.shapes),
    group=groups.shape[1],
    trips=trips,
    overlaps=overlaps,
    members=tuple(int(m) for m in groups[0]),
  )


def _groups(i: Instruction, devices: int) -> Int[np.ndarray, 'G n']:
  """Groups of an exchange, as positions in the mesh."""
  pairs = re.findall(r'\{(\d+),(\d+)\}', i.attribute('source_target_pairs'))
  if pairs:
    return np.array(pairs, int)
  text = i.attribute('replica_groups')
  if text.startswith('mesh'):
    return _named_groups(i.text)
  iota = re.match(r'\[([\d,]+)\]<=(\[.*)', text)
  if iota:
    return _iota(iota.group(2)).reshape(_numbers(iota.group(1)))
  listed = re.findall(r'\{([\d, ]+)\}', text)
  if listed:
    return np.array([[int(n) for n in group.split(',')] for group in listed])
  return np.arange(devices)[None]


def _numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text)]


def _iota(text: str) -> Int[np.ndarray, '...']:
  """`[2,4]T(1,0)`: counted up, reshaped, transposed."""
  found = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  assert found, text
  dims, order = found.groups()
  sizes = _numbers(dims)
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(_numbers(order)) if order else ids


def _named_groups(text: str) -> Int[np.ndarray, 'G n']:
  """`mesh['a'=4,'b'=2], device_ids=([8]) {'a'}`: a mesh, axes of a group.

  `'a':(2)4` is a part of an axis: size 4, behind a part of size 2.
  """
  found = re.search(
    r'mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}', text
  )
  assert found, text
  axes = {n: int(size) for n, size in re.findall(_AXIS, found.group(1))}
  parts: list[tuple[int, bool]] = []
  wanted = re.findall(_PART, found.group(3))
  for name, size in axes.items():
    # What lies before, in, and behind the part that is asked for.
    asked = [(pre, part) for axis, pre, part in wanted if axis == name]
    pre, part = (int(n) if n else 0 for n in (asked or [('1', '1')])[0])
    pre, part = max(pre, 1), part or size
    parts += [(pre, False), (part, True), (size // (pre * part), False)]
  ids = (
    _iota(found.group(2))
    if found.group(2)
    else np.arange(math.prod(axes.values()))
  )
  ids = ids.reshape([n for n, _ in parts])
  inner = [k for k, (_, grouped) in enumerate(parts) if grouped]
  outer = [k for k, (_, grouped) in enumerate(parts) if not grouped]
  size = math.prod(parts[k][0] for k in inner)
  return ids.transpose(outer + inner).reshape(-1, size)


def _axes(
  groups: Int[np.ndarray, 'G n'], mesh: Mapping[str, int]
) -> tuple[str, ...]:
  """Mesh axes along which the members of the groups differ."""
  places = np.unravel_index(groups, tuple(mesh.values()))
  return tuple(
    name
    for name, place in zip(mesh, places, strict=True)
    if np.any(place != place[:, :1])
  )
