"""`tf.train.Example`, read and written without TensorFlow or protobuf.

In: the bytes of a serialized example. Out: name -> list of bytes, floats or
whole numbers; and back, for generated data. Called by the source `tfds`.
Source: the wire format of protocol buffers, and example.proto of TensorFlow.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence

_BYTES, _FLOATS, _INTS = 1, 2, 3  # fields of a Feature
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types

Values = list[bytes] | list[float] | list[int]


def parse_example(content: bytes) -> dict[str, Values]:
  """Every feature of an example.

  Raises:
    ValueError: not a serialized example.
  """
  found: dict[str, Values] = {}
  try:
    for _, features in _fields(content, 1):
      for _, entry in _fields(features, 1):
        parts = dict(_fields(entry))
        found[bytes(parts[1]).decode()] = _values(parts.get(2, b''))
  except (IndexError, KeyError, TypeError, struct.error) as error:
    raise ValueError(f'not a serialized tf.train.Example: {error!r}') from error
  return found


def _values(feature: bytes) -> Values:
  for kind, content in _fields(feature):
    if kind == _BYTES:
      return [bytes(value) for _, value in _fields(content, 1)]
    if kind == _FLOATS:
      packed = b''.join(bytes(value) for _, value in _fields(content, 1))
      return list(struct.unpack(f'<{len(packed) // 4}f', packed))
    if kind == _INTS:
      ints: list[int] = []
      for _, value in _fields(content, 1):
        if isinstance(value, int):
          ints.append(_signed(value))
          continue
        at = 0
        while at < len(value):
          number, at = _varint(value, at)
          ints.append(_signed(number))
      return ints
  return []


def _fields(content: bytes, only: int = 0) -> Iterator[tuple[int, bytes]]:
  """(number, content) of each field; a varint is given as an int."""
  at = 0
  while at < len(content):
    tag, at = _varint(content, at)
    number, wire = tag >> 3, tag & 7
    if wire == _VARINT:
      value, at = _varint(content, at)
    else:
      if wire == _LENGTH:
        size, at = _varint(content, at)
      else:
        size = {_FIXED64: 8, _FIXED32: 4}[wire]
      value = content[at : at + size]
      if len(value) < size:
        raise IndexError(f'cut {size - len(value)} bytes short')
      at += size
    if only in (0, number):
      yield number, value  # pyright: ignore[reportReturnType]


def _varint(content: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = content[at]
    at += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, at
    shift += 7


def _signed(value: int) -> int:
  return value - (1 << 64) if value >> 63 else value


def write_example(features: Mapping[str, Sequence[bytes | int]]) -> bytes:
  """A serialized example of bytes and whole numbers."""
  entries = b''
  for name, values in features.items():
    if values and isinstance(values[0], bytes):
      content = b''.join(_field(1, v) for v in values if isinstance(v, bytes))
      feature = _field(_BYTES, content)
    else:
      ints = b''.join(_to_varint(v) for v in values if isinstance(v, int))
      feature = _field(_INTS, _field(1, ints))
    entries += _field(1, _field(1, name.encode()) + _field(2, feature))
  return _field(1, entries)


def _field(number: int, content: bytes) -> bytes:
  return _to_varint(number << 3 | _LENGTH) + _to_varint(len(content)) + content


def _to_varint(value: int) -> bytes:
  value &= (1 << 64) - 1
  out = bytearray()
  while value > 0x7F:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  out.append(value)
  return bytes(out)
