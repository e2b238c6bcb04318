"""Members of tar and zip files by place, read without unpacking.

In: an uncompressed tar, or a zip. Out: name, place and sizes of each member
(`members`), and its bytes (`content_of`). Formats: POSIX ustar and pax, GNU
long names (through `tarfile`), zip stored or deflated.
"""

import os
import pathlib
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from scar_jax.data.records import RecordError

TAR, ZIP = '.tar', '.zip'
# Of a local zip header: its signature, and the two lengths behind 22 bytes.
_LOCAL = struct.Struct('<4s22xHH')


class Member(NamedTuple):
  """One regular file in an archive.

  Attributes:
    name: as stored.
    start: bytes before its content; of a zip, before its local header.
    size: bytes of its content as stored.
    deflated: whether it has to be inflated.
    header: bytes before its first header; a tar may begin to be read here.
  """

  name: str
  start: int
  size: int
  deflated: bool
  header: int


def is_archive(path: str | os.PathLike) -> bool:
  """Whether the name is that of a tar or zip file."""
  return pathlib.Path(path).suffix in (TAR, ZIP)


def members(path: str | os.PathLike) -> Iterator[Member]:
  """The regular files in an archive, in the order of the archive.

  Raises:
    ValueError: compressed as a whole, or broken, after the members before the
      break; names the archive.
  """
  path = pathlib.Path(path)
  if path.stat().st_size == 0:
    raise ValueError(f'{path}: empty file (0 bytes)')
  try:
    if path.suffix == ZIP:
      yield from _zip_members(path)
    else:
      yield from _tar_members(path)
  except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
    with open(path, 'rb') as file:
      packed = file.read(2) in (b'\x1f\x8b', b'BZ', b'\xfd7', b'\x28\xb5')
    reason = (
      'is compressed as a whole, so no member can be read alone; decompress it'
      if packed
      else f'is broken: {error}'
    )
    raise ValueError(f'{path} {reason}') from error


def _tar_members(path: pathlib.Path) -> Iterator[Member]:
  size = path.stat().st_size
  with tarfile.open(path, 'r:') as tar:
    header = 0
    while (info := tar.next()) is not None:
      # tarfile keeps what it has read; a shard may hold millions.
      tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
      if info.isreg():
        if info.offset_data + info.size > size:
          raise tarfile.ReadError(f'{info.name} goes past the end of the file')
        yield Member(info.name, info.offset_data, info.size, False, header)
      header = tar.offset
    # tarfile takes a broken or missing header behind the first for the end.
    if not _ends(path, header):
      raise tarfile.ReadError(f'neither a file nor the end at byte {header}')


def _ends(path: pathlib.Path, start: int) -> bool:
  """Whether a block of zeros, the end mark, lies here."""
  with open(path, 'rb') as file:
    file.seek(start)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _zip_members(path: pathlib.Path) -> Iterator[Member]:
  with zipfile.ZipFile(path) as file:
    for info in file.infolist():
      if info.is_dir():
        continue
      if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(
          f'{info.filename} is packed by method {info.compress_type};'
          ' accepted: stored, deflated'
        )
      if info.flag_bits & 1:
        raise zipfile.BadZipFile(f'{info.filename} is encrypted')
      at = info.header_offset
      deflated = info.compress_type == zipfile.ZIP_DEFLATED
      yield Member(info.filename, at, info.compress_size, deflated, at)


def content_of(
  path: pathlib.Path, start: int, size: int, deflated: bool
) -> bytes:
  """The content of one member, from its place.

  Raises:
    RecordError: cut short or broken; names the archive.
  """
  with open(path, 'rb', buffering=0) as file:
    if path.suffix == ZIP:
      signature, *lengths = _LOCAL.unpack(
        os.pread(file.fileno(), _LOCAL.size, start).ljust(_LOCAL.size)
      )
      if signature != b'PK\3\4':
        raise RecordError(path.name, f'no zip member at byte {start}')
      start += _LOCAL.size + sum(lengths)
    content = os.pread(file.fileno(), size, start)
  if len(content) < size:
    raise RecordError(
      path.name, f'ends {size - len(content)} bytes before its member does'
    )
  if not deflated:
    return content
  try:
    # Negative: raw deflate, as zip stores it.
    return zlib.decompress(content, -zlib.MAX_WBITS)
  except zlib.error as error:
    raise RecordError(
      path.name, f'member cannot be inflated: {error}'
    ) from None
