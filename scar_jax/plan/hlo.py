"""Reads the text of a compiled module: computations, shapes, trip counts.

In: `compiled.as_text()` of XLA, for any backend, or `lowered.as_text('hlo')`.
Out: a `Module` of instructions with typed shapes, memory spaces, operands and
attributes. Nothing here knows what an instruction costs; that is `costs.py`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

_BYTES = {
  'pred': 1, 's4': 0.5, 'u4': 0.5, 's2': 0.25, 'u2': 0.25, 's8': 1, 'u8': 1,
  's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4,
  's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16, 'token': 0, 'opaque': 0,
}  # fmt: skip
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?')
_TILE = re.compile(r'T\(([\d,]+)\)')
_SPACE = re.compile(r'S\((\d+)\)')
_COMMENT = re.compile(r'/\*.*?\*/')
_HEAD = re.compile(r'^(ENTRY\s+)?%?([\w.\-]+)\s+(?:\(.*\)\s*->.*)?\{\s*$')
_START = re.compile(r'^\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*')
_TRIPS = re.compile(r'known_trip_count"?\s*:\s*\{\s*"?n"?\s*:\s*"?(\d+)')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|called_computations|branch_computations|'
  r'true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
)
HBM = 0  # the memory space of shapes that name none
_SAME = ('copy', 'bitcast', 'convert', 'copy-done', 'copy-start')


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array.

  Attributes:
    dtype: of its elements.
    dims: its sizes.
    space: that it lies in; 0 is HBM.
    order: its dimensions, the one whose elements lie side by side first.
    tile: sizes of a tile, the last of them along that dimension.
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = HBM
  order: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """With what fills its tiles: TPUs keep, and move, whole ones."""
    dims = list(self.dims)
    # A dimension more than the array has is a tile's alone.
    for place, side in zip(self.order, reversed(self.tile), strict=False):
      dims[place] = -(-dims[place] // side) * side
    # The 8-bit floats have long names.
    return math.prod(dims) * _BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One line of a module.

  Attributes:
    name: without the percent sign.
    opcode: such as 'fusion'.
    shapes: of the result; several for a tuple, flattened.
    operands: names.
    text: attributes and metadata, as they stand.
    root: it is the result of its computation.
    inner: what stands between the parentheses, for constants and parameters.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  text: str
  root: bool = False
  inner: str = ''

  def attribute(self, name: str) -> str:
    """Value of `name=...` up to the next comma outside braces, or ''."""
    found = re.search(rf'(?:^|[\s,]){name}=', self.text)
    if not found:
      return ''
    start, depth = found.end(), 0
    for i, letter in enumerate(self.text[start:], start):
      depth += (letter in '{[(') - (letter in '}])')
      if depth <= 0 and letter in ', ':
        return self.text[start:i]
    return self.text[start:]

  def called(self, *names: str) -> tuple[str, ...]:
    """Computations that it names; of the given attributes, or of all."""
    found: list[str] = []
    for attribute in _CALLED.finditer(self.text):
      if not names or attribute.group(0).split('=')[0] in names:
        listed = attribute.group(1).strip('{}').split(',')
        found += [name.strip().lstrip('%') for name in listed if name.strip()]
    return tuple(found)


class Computation(dict[str, Instruction]):
  """Instructions by name, in the order of their execution."""

  @property
  def root(self) -> Instruction:
    """The result."""
    for instruction in self.values():
      if instruction.root:
        return instruction
    return list(self.values())[-1]

  def users(self) -> dict[str, list[Instruction]]:
    """Instruction name -> those that read it."""
    found: dict[str, list[Instruction]] = {name: [] for name in self}
    for instruction in self.values():
      for operand in dict.fromkeys(instruction.operands):
        found.setdefault(operand, []).append(instruction)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
  """A compiled program of one device.

  Attributes:
    computations: by name.
    entry: name of the one that runs.
  """

  computations: dict[str, Computation]
  entry: str

  def trips(self, loop: Instruction, inside: Computation) -> int | None:
    """How often the body of a `while` runs; None if it depends on data.

    Args:
      loop: the instruction.
      inside: the computation that it stands in.
    """
    found = _TRIPS.search(loop.text)
    if found:
      return int(found.group(1))
    condition, body = (
      self.computations.get((loop.called(name) or ('',))[0], Computation())
      for name in ('condition', 'body')
    )
    limit = self._limit(condition)
    if limit is None or not body:
      return None
    place, bound = limit
    step = self._step(body, place)
    start = inside.get(loop.operands[0])
    first = 0
    if start is not None and start.opcode == 'tuple':
      first = constant(start.operands[place], inside)
    if first is None or not step or step < 0:
      return None
    return max(-(-(bound - first) // step), 0)

  def _limit(self, condition: Computation) -> tuple[int, int] | None:
    """(place of the counter, what it stays below) of a condition."""
    if not condition:
      return None
    compare, sides = condition.root, condition.root.operands
    if compare.opcode == 'fusion':
      fused = self.computations[compare.called('calls')[0]]
      compare = fused.root
      sides = [_outer(name, fused, sides) for name in compare.operands]
    if compare.opcode != 'compare' or 'direction=LT' not in compare.text:
      return None
    counter, bound = condition.get(sides[0]), constant(sides[1], condition)
    if counter is None or counter.opcode != 'get-tuple-element':
      return None
    return None if bound is None else (int(counter.attribute('index')), bound)

  def _step(self, body: Computation, place: int) -> int | None:
    """What a body adds to its counter."""
    added = body.get(body.root.operands[place])
    while added is not None and added.opcode in _SAME:
      added = body.get(added.operands[0])
    if added is None:
      return None
    sides, names = added.operands, body
    if added.opcode == 'fusion':
      names = self.computations[added.called('calls')[0]]
      added, outer = names.root, sides
      sides = [_outer(name, names, outer) for name in added.operands]
    if added.opcode != 'add':
      return None
    values = [
      value
      for inner, outer in zip(added.operands, sides, strict=True)
      for value in (constant(inner, names), constant(outer, body))
      if value is not None
    ]
    return values[0] if values else None


def constant(name: str, inside: Computation) -> int | None:
  """The whole number that a name stands for, or None."""
  found = inside.get(name)
  while found is not None and found.opcode in _SAME:
    found = inside.get(found.operands[0])
  if found is None or found.opcode != 'constant':
    return None
  text = found.inner.strip()
  return int(text) if re.fullmatch(r'-?\d+', text) else None


def _outer(name: str, fused: Computation, given: Sequence[str]) -> str:
  """What a fusion was given in place of a parameter."""
  found = fused.get(name)
  if found is None or found.opcode != 'parameter':
    return name
  return given[int(found.inner)]


def parse(text: str) -> Module:
  """Reads a module.

  Raises:
    ValueError: no entry computation is in the text.
  """
  computations: dict[str, Computation] = {}
  entry, current = '', None
  for line in _whole_lines(text):
    head = _HEAD.match(line)
    if head:
      current = computations.setdefault(head.group(2), Computation())
      if head.group(1):
        entry = head.group(2)
    elif line.split('\n', 1)[0].rstrip() == '}':
      current = None
    elif current is not None:
      instruction = _instruction(line)
      if instruction is not None:
        current[instruction.name] = instruction
  if not entry:
    raise ValueError(
      'no ENTRY computation in the text of a compiled module; accepted: what '
      'compiled.as_text() returns'
    )
  return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
  """Lines, with those that an attribute with line breaks goes on in."""
  held: list[str] = []
  for line in text.splitlines():
    starts = _START.match(line) or _HEAD.match(line) or line.rstrip() == '}'
    if starts and held:
      yield '\n'.join(held)
      held = []
    held.append(line)
  yield '\n'.join(held)


def _instruction(line: str) -> Instruction | None:
  start = _START.match(line)
  if not start:
    return None
  at = start.end()
  end = _closing(line, at) + 1 if line[at] == '(' else line.find(' ', at)
  shapes = tuple(_shapes(line[at:end]))
  opening = line.find('(', end)
  if opening < 0:
    return None
  closing = _closing(line, opening)
  inner = line[opening + 1 : closing]
  return Instruction(
    name=start.group(2),
    opcode=line[end:opening].strip(),
    shapes=shapes,
    operands=tuple(_names(inner)),
    text=line[closing + 1 :].lstrip(', '),
    root=bool(start.group(1)),
    inner=inner,
  )


def _names(inner: str) -> Iterator[str]:
  """Operands, written with or without their shapes."""
  depth, word = 0, ''
  for letter in _COMMENT.sub('', inner) + ',':
    depth += (letter in '{[(') - (letter in '}])')
    if letter == ',' and not depth:
      if word.strip():
        yield word.split()[-1].lstrip('%')
      word = ''
    else:
      word += letter


def _shapes(text: str) -> Iterator[Shape]:
  for dtype, dims, layout in _SHAPE.findall(text):
    space, tile = _SPACE.search(layout), _TILE.search(layout)
    yield Shape(
      dtype,
      tuple(int(re.sub(r'\D', '', d)) for d in dims.split(',') if d.strip()),
      int(space.group(1)) if space else HBM,
      _ints(layout.partition(':')[0]),
      _ints(tile.group(1)) if tile else (),
    )


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(word) for word in text.split(',') if word.strip())


def _closing(text: str, opening: int) -> int:
  """Place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  return len(text) - 1
