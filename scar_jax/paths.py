"""Directories on this machine or in a bucket, handled alike.

In: what a user wrote after `--workdir=`. Out: an `epath.Path`, absolute where
it is local; and the few things that a bucket does differently: it has no
append, no rename of a directory, and writes each object whole or not at all.
"""

import os
import pathlib

from etils import epath

from scar_jax.extras import require

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
  """Whether it names an object store: `gs://bucket/run`."""
  return '://' in os.fspath(path)


def folder(path: PathLike) -> epath.Path:
  """The path, ready for use.

  Args:
    path: local, or `gs://bucket/name`.

  Raises:
    ValueError: a bucket, and the extra that reaches it is not installed.
  """
  if not is_remote(path):
    return epath.Path(os.path.abspath(os.path.expanduser(os.fspath(path))))
  scheme = os.fspath(path).partition('://')[0]
  if scheme != 'gs':
    raise ValueError(
      f'{path}: accepted: a local directory, or gs://bucket/name'
    )
  require('gcsfs', 'gcs')
  return epath.Path(path)


def cache_dir(path: str = '') -> pathlib.Path:
  """`path`, else SCAR_CACHE, else the user's cache folder."""
  if path or (path := os.environ.get('SCAR_CACHE', '')):
    return pathlib.Path(path)
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'scar_jax'


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
  """Writes a file whole or not at all."""
  if is_remote(path):
    path.write_bytes(content)
    return
  part = path.with_name(f'{path.name}.part')
  part.write_bytes(content)
  part.replace(path)


def swap_in(part: epath.Path, target: epath.Path) -> None:
  """Renames a finished local directory into the place of an older one."""
  if not target.exists():
    part.rename(target)
    return
  old = target.with_name(f'{target.name}.old')
  old.rmtree(missing_ok=True)
  target.rename(old)
  part.rename(target)
  old.rmtree()
