"""What a compiled module does: FLOPs, bytes of HBM, collectives.

In: a `Module` of `hlo.py` and the shape of the mesh. Out: `Costs`: one `Op` for
each instruction that runs, with how often it runs. XLA's own `cost_analysis`
counts the body of a loop once and a Pallas kernel as nothing; here bodies count
by their trips, and kernels by what the caller knows about them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from scar_jax.plan.collectives import COLLECTIVES, Collective, exchange
from scar_jax.plan.flops_hlo import instruction_flops
from scar_jax.plan.hlo import HBM, Computation, Instruction, Module

# Names for other values, or work that is counted elsewhere.
_FREE = frozenset(
  (
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'),
    *('while', 'conditional', 'call', 'after-all', 'partition-id'),
    *('replica-id', 'opt-barrier', 'domain'),
    *('async-start', 'async-update', 'async-done'),
  )
)
_FREE_CALLS = frozenset(
  (
    *('AllocateBuffer', 'AssumeGatherIndicesInBound', 'ConcatBitcast'),
    *('AsyncCollectiveStart', 'AsyncCollectiveDone', 'Sharding'),
  )
)
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Op:
  """One instruction.

  Attributes:
    name: in the module.
    opcode: such as 'fusion'.
    flops: of matrix products and convolutions, each time.
    bytes: read from and written to HBM, each time.
    trips: how often it runs.
    loop: the outermost loop that it is in, with its trips; '' is none.
    beside: a copy between HBM and on-chip memory, started while other work
      runs and awaited after it.
  """

  name: str
  opcode: str
  flops: float
  bytes: float
  trips: int
  loop: tuple[str, int] = ('', 1)
  beside: bool = False


@dataclasses.dataclass(frozen=True)
class Costs:
  """All that one device does in one run of a module.

  Attributes:
    ops: instructions that compute or move bytes of HBM.
    collectives: exchanges.
    unknown_loops: loops whose trips depend on data; counted once.
  """

  ops: tuple[Op, ...]
  collectives: tuple[Collective, ...]
  unknown_loops: int

  @property
  def flops(self) -> float:
    """Of matrix products and convolutions."""
    return sum(op.flops * op.trips for op in self.ops)

  @property
  def kernel_flops(self) -> float:
    """Of these, what Pallas kernels do: attention."""
    return sum(
      op.flops * op.trips for op in self.ops if op.opcode == 'custom-call'
    )

  @property
  def bytes(self) -> float:
    """Read from and written to HBM."""
    return sum(op.bytes * op.trips for op in self.ops)

  def turn_bytes(self) -> float:
    """Bytes of HBM of one turn of the longest outermost loop, 0 without.

    Of a sampler, that is a decoding step.
    """
    loop = max((op.loop for op in self.ops), key=lambda loop: loop[1])
    if not loop[0]:
      return 0.0
    inside = (op for op in self.ops if op.loop == loop)
    return sum(op.bytes * op.trips for op in inside) / loop[1]


def count(
  module: Module,
  mesh: Mapping[str, int],
  kernels: Mapping[str, float] | None = None,
) -> Costs:
  """Walks what runs.

  Args:
    module: of one device.
    mesh: axis -> size, in the order of the devices.
    kernels: what the names of custom calls begin with -> FLOPs of one call.
  """
  walk = _Walk(module, mesh, kernels or {})
  walk.run(module.entry, 1, False)
  return Costs(tuple(walk.ops), tuple(walk.collectives), walk.unknown)


class _Walk:
  """Collects costs on its way through the computations."""

  def __init__(
    self, module: Module, mesh: Mapping[str, int], kernels: Mapping[str, float]
  ):
    self.module, self.mesh, self.kernels = module, mesh, kernels
    self.ops: list[Op] = []
    self.collectives: list[Collective] = []
    self.unknown = 0
    self.loop = ('', 1)
    self.chains: set[tuple[str, str]] = set()

  def run(self, name: str, trips: int, overlaps: bool) -> None:
    inside = self.module.computations.get(name, Computation())
    for instruction in inside.values():
      self._visit(instruction, inside, trips, overlaps)

  def _visit(
    self, i: Instruction, inside: Computation, trips: int, overlaps: bool
  ) -> None:
    if i.opcode == 'while':
      times = self.module.trips(i, inside)
      self.unknown += times is None
      outside, times = self.loop, 1 if times is None else times
      if not outside[0]:
        self.loop = (i.name, times)
      for body in i.called('body'):
        self.run(body, trips * times, overlaps)
      self.loop = outside
      return
    if i.opcode == 'conditional':
      self._largest(i.called(), trips, overlaps)
      return
    if i.opcode in ('call', 'async-start'):
      for name in i.called():
        self.run(name, trips, overlaps or i.opcode == 'async-start')
      return
    kind = i.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      apart = overlaps or kind != i.opcode
      self.collectives.append(
        exchange(i, kind, inside, self.mesh, trips, apart)
      )
      return
    if i.opcode == 'fusion':
      self._fused_exchanges(i, trips)
    flops = instruction_flops(i, inside, self.module, self.kernels)
    moved = hbm_bytes(i, inside, self.module)
    if flops or moved:
      beside = i.opcode.endswith('-start') and _work_until_done(i, inside)
      self.ops.append(
        Op(i.name, i.opcode, flops, moved, trips, self.loop, beside)
      )

  def _largest(self, names: Sequence[str], trips: int, overlaps: bool) -> None:
    """The branch with the most FLOPs, then bytes."""
    branches = []
    for name in names:
      walk = _Walk(self.module, self.mesh, self.kernels)
      walk.loop = self.loop
      walk.run(name, trips, overlaps)
      branches.append(walk)
    if not branches:
      return
    most = max(
      branches,
      key=lambda w: (sum(o.flops for o in w.ops), sum(o.bytes for o in w.ops)),
    )
    self.ops += most.ops
    self.collectives += most.collectives
    self.unknown += most.unknown

  def _fused_exchanges(self, i: Instruction, trips: int) -> None:
    """Exchanges that the TPU compiler put into fusions.

    An asynchronous one stands in the fusion that starts it, in each matrix
    product that it runs beside and in the one that ends it, under one chain
    and channel: it counts once. An all-reduce of which a fusion keeps a slice
    is a reduce-scatter, and nothing runs beside it.
    """
    for name in i.called('calls'):
      inside = self.module.computations.get(name, Computation())
      for inner in inside.values():
        kind = inner.opcode.removesuffix('-start')
        if inner.opcode == 'fusion':
          self._fused_exchanges(inner, trips)
        if kind not in COLLECTIVES:
          continue
        chain = re.search(r'chain_id="(\d+)"', inner.text)
        if chain:
          key = (chain.group(1), inner.attribute('channel_id'))
          if key in self.chains:
            continue
          self.chains.add(key)
        elif any(x.opcode == 'dynamic-slice' for x in inside.values()):
          kind = 'reduce-scatter'
        self.collectives.append(
          exchange(inner, kind, inside, self.mesh, trips, bool(chain))
        )


def _work_until_done(i: Instruction, inside: Computation) -> bool:
  """Whether anything runs between the start of a copy and its end."""
  order = list(inside)
  for name in order[order.index(i.name) + 1 :]:
    other = inside[name]
    if other.opcode.endswith('-done') and i.name in other.operands:
      return False
    handed_on = other.opcode in _FREE or _is_free(other)
    if not handed_on and not other.opcode.endswith(('-start', '-done')):
      return True
  return False


def hbm_bytes(i: Instruction, inside: Computation, module: Module) -> float:
  """Bytes of HBM that one instruction reads and writes.

  What stays in on-chip memory is free; of what is sliced, the slice counts, and
  of what is updated in place, the update.
  """
  if i.opcode in _FREE or i.opcode.endswith('-done') or _is_free(i):
    return 0.0
  operands = [inside[name] for name in i.operands if name in inside]
  if i.opcode == 'fusion':
    fused = module.computations.get((i.called('calls') or ('',))[0])
    if fused:
      # The start and the end of an exchange only hand buffers on.
      if any('"AsyncCollective' in inner.text for inner in fused.values()):
        return 0.0
      return _fused_bytes(i, operands, fused, module)
  if i.opcode in _SLICES:
    return 2.0 * _in_hbm(i)
  if i.opcode == 'dynamic-update-slice':
    return 2.0 * _in_hbm(operands[1]) if len(operands) > 1 else 0.0
  if i.opcode == 'copy-start':
    # (destination, source, context): each side that lies in HBM counts.
    return sum(s.bytes for s in i.shapes[:2] if s.space == HBM)
  if i.opcode == 'slice-start':
    # (source, slice, context).
    source, part = i.shapes[:2]
    return part.bytes * ((source.space == HBM) + (part.space == HBM))
  return _in_hbm(i) + sum(_in_hbm(o) for o in operands)


def _is_free(i: Instruction) -> bool:
  target = i.attribute('custom_call_target').strip('"')
  return i.opcode == 'custom-call' and target in _FREE_CALLS


def _in_hbm(i: Instruction) -> float:
  return sum(s.bytes for s in i.shapes if s.space == HBM)


def _fused_bytes(
  i: Instruction,
  operands: Sequence[Instruction],
  fused: Computation,
  module: Module,
) -> float:
  read = _reads(fused, module)
  total = 0.0
  for place, outer in enumerate(operands):
    whole = _in_hbm(outer)
    if whole:
      total += min(whole, read.get(place, 0.0))
  return total + _written(i, fused, module)


def _reads(fused: Computation, module: Module) -> dict[int, float]:
  """Place of a parameter -> bytes of it that a fusion looks at."""
  users = fused.users()
  return {
    int(inner.inner): _read(inner, users, module)
    for inner in fused.values()
    if inner.opcode == 'parameter' and inner.inner.strip().isdigit()
  }


def _read(
  value: Instruction, users: Mapping[str, list], module: Module
) -> float:
  """Bytes of a value that its users look at; infinity is all of them."""
  total = 0.0
  for user in users.get(value.name, ()):
    if user.opcode == 'bitcast':
      total += _read(user, users, module)
    elif user.opcode == 'tuple' or user.opcode in COLLECTIVES:
      continue  # handed on
    elif user.opcode in _SLICES and user.operands[0] == value.name:
      total += sum(s.bytes for s in user.shapes)
    elif (
      user.opcode == 'dynamic-update-slice' and user.operands[0] == value.name
    ):
      continue
    elif user.opcode == 'fusion' and user.called('calls'):
      # A fusion within a fusion, where the slices of stacked layers end up.
      reads = _reads(module.computations[user.called('calls')[0]], module)
      total += sum(
        reads.get(place, 0.0)
        for place, name in enumerate(user.operands)
        if name == value.name
      )
    else:
      return math.inf
  return total


def _written(i: Instruction, fused: Computation, module: Module) -> float:
  """Bytes that a fusion writes; of an update in place, the update."""
  root = fused.root
  parts = [root]
  if root.opcode == 'tuple':
    parts = [fused[name] for name in root.operands if name in fused]
  if len(parts) != len(i.shapes):
    return _in_hbm(i)
  total = 0.0
  for shape, part in zip(i.shapes, parts, strict=True):
    where = fused
    while True:
      if part.opcode in ('bitcast', *COLLECTIVES):
        part = where[part.operands[0]]
      elif part.opcode == 'fusion' and len(part.shapes) == 1:
        where = module.computations[part.called('calls')[0]]
        part = where.root
      else:
        break
    size = 0.0 if part.opcode == 'parameter' else shape.bytes
    if part.opcode == 'dynamic-update-slice' and part.operands[1] in where:
      size = sum(s.bytes for s in where[part.operands[1]].shapes)
    total += size * (shape.space == HBM)
  return total
