"""Activations that a forward pass keeps for the backward pass, in a module.

In: a `Module`. Out: bytes of one device. The loop over layers writes them into
fresh buffers, one slice a layer; the loop back reads them. So they are what one
loop hands to a later one and did not get from outside. Layers that are not
scanned leave no such trace. Called by `report.py`.
"""

from scar_jax.plan.hlo import HBM, Computation, Instruction, Module

# What only gives a value another name, place or layout.
_SAME = frozenset(
  (
    *('copy', 'copy-start', 'copy-done', 'bitcast', 'opt-barrier'),
    *('get-tuple-element', 'convert', 'transpose', 'reshape'),
  )
)


def saved_bytes(module: Module) -> float:
  """Bytes of HBM that scanned layers keep, over all pairs of loops."""
  found = (_between(inside, module) for inside in module.computations.values())
  return max(found, default=0.0)


def _between(inside: Computation, module: Module) -> float:
  """Of the loops of one computation."""
  loops = [i for i in inside.values() if i.opcode == 'while']
  total = 0.0
  for later in loops:
    given = (_origin(name, inside) for name in _elements(later, inside))
    for loop, index in dict.fromkeys(filter(None, given)):
      earlier = inside[loop]
      starts, shape = _elements(earlier, inside), earlier.shapes[index]
      stacked = shape.dims[:1] == (module.trips(earlier),)
      if stacked and starts and _fresh(starts[index], inside):
        total += shape.bytes if shape.space == HBM else 0.0
  return total


def _elements(loop: Instruction, inside: Computation) -> tuple[str, ...]:
  """Names of what a loop starts from."""
  start = inside.get(loop.operands[0])
  if start is None or start.opcode != 'tuple':
    return ()
  return start.operands


def _origin(name: str, inside: Computation) -> tuple[str, int] | None:
  """(loop, index) of the result that a value is, or None."""
  while name in inside:
    found = inside[name]
    if found.opcode == 'get-tuple-element':
      source = inside.get(found.operands[0])
      if source is not None and source.opcode == 'while':
        return source.name, int(found.attribute('index'))
    if found.opcode not in _SAME:
      return None
    name = found.operands[0]
  return None


def _fresh(name: str, inside: Computation) -> bool:
  """A buffer without content of its own."""
  while name in inside and inside[name].opcode in _SAME:
    name = inside[name].operands[0]
  found = inside.get(name)
  if found is None:
    return False
  filled = ('broadcast', 'constant', 'iota')
  allocated = 'AllocateBuffer' in found.text
  # A fusion of nothing but constants fills a buffer too.
  return (
    found.opcode in filled
    or allocated
    or (
      found.opcode == 'fusion'
      and all(_fresh(operand, inside) for operand in found.operands)
    )
  )
