"""Tensor files on disk, opened without reading the tensors.

In: a path: `.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt`, an index of shards,
or a directory that holds one of these. Out: `Contents`: `Stored` tensors by
name, each read when asked for. No code of a file is ever run. Source of the
formats: huggingface/safetensors README, torch.save.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from scar_jax.extras import require

PICKLED = ('.pt', '.pth', '.bin', '.ckpt')
# What a directory of a published model may hold, best first.
_IN_DIRECTORY = (
  'model.safetensors',
  'model.safetensors.index.json',
  'pytorch_model.bin.index.json',
  'pytorch_model.bin',
)
_DTYPES: Mapping[str, Any] = {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
  'BF16': ml_dtypes.bfloat16, 'BOOL': np.bool_,
  'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8,
  'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8,
}  # fmt: skip
_LONGEST_HEADER = 10**8  # bytes, the limit of the format's own library


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor that lies in a file.

  Attributes:
    shape: of the tensor.
    dtype: numpy's, with those of ml_dtypes.
    read: reads it into memory of its own.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Contents:
  """A file's tensors.

  Attributes:
    tensors: by name; keys of nested dicts are joined by dots.
    containers: outermost keys of a pickled file that hold dicts.
  """

  tensors: Mapping[str, Stored]
  containers: frozenset[str] = frozenset()


def open_file(path: str | os.PathLike[str]) -> Contents:
  """The tensors of a file, of all shards of an index, or of a directory.

  Raises:
    ValueError: no such file, another ending, a cut or damaged file, objects
      other than tensors and plain values, or PyTorch is needed and absent.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = _in_directory(path)
  if not path.is_file():
    raise ValueError(f'--checkpoint={str(path)!r}: no such file')
  if path.suffix == '.safetensors':
    return Contents(_open_safetensors(path))
  if path.suffix == '.json':
    return Contents(_open_index(path))
  if path.suffix in PICKLED:
    return _open_pickled(path)
  raise ValueError(
    f'--checkpoint={str(path)!r} has the ending {path.suffix!r}; accepted: '
    f'.safetensors, {", ".join(PICKLED)}, an index .json, or a directory'
  )


def _in_directory(path: pathlib.Path) -> pathlib.Path:
  for name in _IN_DIRECTORY:
    if (path / name).is_file():
      return path / name
  found = sorted(p.name for p in path.iterdir())[:10]
  raise ValueError(
    f'--checkpoint={str(path)!r} is a directory with {found}; accepted: one '
    f'that holds {", ".join(_IN_DIRECTORY)}, or the path of a file'
  )


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  counts = collections.Counter(name for name, _ in pairs)
  twins = sorted(name for name, n in counts.items() if n > 1)
  if twins:
    raise ValueError(f'the names {twins} occur twice')
  return dict(pairs)


def _open_safetensors(path: pathlib.Path) -> dict[str, Stored]:
  """Reads the header; mapped pages would count as memory of the process."""

  def damaged(what: str) -> ValueError:
    return ValueError(
      f'{path} is no whole safetensors file: {what} (was it downloaded to the '
      'end? A small text file is a pointer to large storage)'
    )

  size = path.stat().st_size
  with path.open('rb') as file:
    start = file.read(8)
    length = int.from_bytes(start, 'little')
    if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
      raise damaged(f'{size} bytes do not hold its header')
    try:
      header = json.loads(file.read(length), object_pairs_hook=_no_twins)
      header.pop('__metadata__', None)
      spans = {
        name: (entry['dtype'], tuple(entry['shape']), *entry['data_offsets'])
        for name, entry in header.items()
      }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise damaged(f'its header cannot be read: {error}') from error
  data = 8 + length
  found: dict[str, Stored] = {}
  for name, (code, shape, begin, end) in spans.items():
    if code not in _DTYPES:
      raise ValueError(
        f'{path}: {name} has the type {code}; accepted: {", ".join(_DTYPES)}'
      )
    dtype = np.dtype(_DTYPES[code])
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
      raise damaged(f'{name} {shape} of {code} has {end - begin} bytes')
    if data + end > size:
      raise damaged(f'it has {size} bytes, and {name} ends at {data + end}')
    found[name] = Stored(shape, dtype, _span(path, data + begin, shape, dtype))
  return found


def _span(
  path: pathlib.Path, start: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    out = np.empty(shape, dtype)
    with path.open('rb') as file:
      file.seek(start)
      count = file.readinto(out.reshape(-1).view(np.uint8).data)
    if count != out.nbytes:
      raise ValueError(f'{path} became shorter while it was read')
    return out

  return read


def _open_index(path: pathlib.Path) -> dict[str, Stored]:
  try:
    where = json.loads(path.read_text(), object_pairs_hook=_no_twins)
    where = where['weight_map']
    shards = sorted(set(where.values()))
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
      f'{path} is no index of shards: {error!r}; accepted: JSON with '
      '`weight_map`, such as model.safetensors.index.json'
    ) from error
  found: dict[str, Stored] = {}
  for shard in shards:
    # A name with a folder in it could lead anywhere.
    file = path.with_name(pathlib.PurePath(shard).name)
    if file.name != shard or not file.is_file():
      raise ValueError(
        f'{path} names the shard {shard!r}, which is not beside it; accepted: '
        'all shards in the folder of the index'
      )
    here = open_file(file).tensors
    wanted = {name for name, place in where.items() if place == shard}
    if wanted != set(here):
      raise ValueError(
        f'{file} and its index disagree: {sorted(wanted - set(here))[:10]} '
        f'missing, {sorted(set(here) - wanted)[:10]} not listed or listed '
        'elsewhere; accepted: index and shards of one model'
      )
    found |= here
  return found


def _open_pickled(path: pathlib.Path) -> Contents:
  torch = require('torch', 'convert')
  with path.open('rb') as file:
    zipped = file.read(4) == b'PK\x03\x04'
  if zipped and not zipfile.is_zipfile(path):
    raise ValueError(
      f'{path} ends early: {path.stat().st_size} bytes of a torch file without '
      'its directory (was it downloaded to the end?)'
    )
  try:
    # Training scripts store their arguments beside the weights; a Namespace
    # is a plain holder of values.
    with torch.serialization.safe_globals([argparse.Namespace]):
      tree = torch.load(
        path, map_location='cpu', weights_only=True, mmap=zipped
      )
  except Exception as error:
    raise _unreadable(path, error) from error
  containers: frozenset[str] = frozenset()
  if isinstance(tree, Mapping):
    nested = [k for k, v in tree.items() if isinstance(v, Mapping)]
    containers = frozenset(map(str, nested))
  tensors = _no_twins(list(_walk(torch, tree, '', zipped)))
  return Contents(tensors, containers)


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
  text = str(error)
  if other := re.search(r'GLOBAL (\S+)', text):
    return ValueError(
      f'{path} holds more than tensors: {other[1]}. Nothing of it was run; '
      'accepted: files of tensors, numbers and text (save the state dict '
      'alone, or as .safetensors)'
    )
  first = (text.splitlines() or [type(error).__name__])[0]
  if 'weights_only' in text:  # advice to run the file's code is not passed on
    first = 'its pickle is damaged'
  return ValueError(
    f'{path} cannot be read as a torch file: {first} (was it downloaded to '
    'the end?)'
  )


def _walk(
  torch: Any, node: Any, name: str, mapped: bool
) -> Iterator[tuple[str, Stored]]:
  """Tensors below a node of nested dicts and lists, under dotted names."""
  if isinstance(node, torch.Tensor):
    yield name, _stored(torch, name, node, mapped)
    return
  items: Any = ()
  if isinstance(node, Mapping):
    items = node.items()
  elif isinstance(node, list | tuple):
    items = enumerate(node)
  for key, child in items:
    yield from _walk(
      torch, child, f'{name}.{key}' if name else f'{key}', mapped
    )


def _stored(torch: Any, name: str, tensor: Any, mapped: bool) -> Stored:
  if tensor.layout != torch.strided or tensor.is_quantized:
    raise ValueError(
      f'{name} is a {tensor.layout} tensor of {tensor.dtype}; accepted: dense '
      'ones'
    )
  half = tensor.dtype == torch.bfloat16
  try:
    plain = torch.empty(0, dtype=torch.int16 if half else tensor.dtype).numpy()
  except TypeError as error:
    raise ValueError(
      f'{name} has the type {tensor.dtype}; accepted: floating point of 16 to '
      '64 bits, integers, booleans'
    ) from error
  dtype = np.dtype(ml_dtypes.bfloat16 if half else plain.dtype)

  def read() -> np.ndarray:
    value = tensor.detach()
    if half:
      value = value.contiguous().view(torch.int16)
    array = np.array(value.numpy())
    if mapped:
      storage = tensor.untyped_storage()
      _forget(storage.data_ptr(), storage.nbytes())
    return array.view(ml_dtypes.bfloat16) if half else array

  return Stored(tuple(tensor.shape), dtype, read)


def _forget(address: int, size: int) -> None:
  """Lets go of the pages of a mapped file; without it they add up.

  They are unchanged, so that the next access reads them from the file again.
  """
  import ctypes
  import mmap

  advice = getattr(mmap, 'MADV_DONTNEED', None)
  madvise = getattr(ctypes.CDLL(None), 'madvise', None)
  if advice is None or madvise is None:
    return
  first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
  last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
  if last > first:
    madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
