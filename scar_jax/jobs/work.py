"""Making requests, whoever else makes them too.

In: an `Editor`, requests and a folder. Out: `<id>.png` for each that can be
made, written whole or not at all. What each picture was made from stands in the
picture itself, so that a folder explains itself and a killed job goes on. Any
number of processes share a folder without knowing of each other: a request is
claimed by a lock on one byte of a file, which the system lets go when its
holder dies, however it dies. Called by `commands/sample.py`.
"""

import collections
import contextlib
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin

from scar_jax.eval.report import write_atomic
from scar_jax.jobs.requests import Request

if TYPE_CHECKING:
  from scar_jax.editor import Editor

LOCK = '.claims'
_TEXT = 'scar'  # of the PNG, where it says what it was made from
_WAIT_SECS = 0.2


class Claims:
  """Locks on requests, shared by all processes that work in a folder.

  Byte n of one file stands for line n. The folder must lie on one machine, or
  on a shared file system that has POSIX locks (NFS has).
  """

  def __init__(self, folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    # Closing any other handle of this file would let go of every lock.
    self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)

  def take(self, line: int) -> bool:
    """Whether the line is now ours; False if another process holds it.

    Raises:
      OSError: the file system has no locks.
    """
    try:
      fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, line)
    except (BlockingIOError, PermissionError):
      return False
    return True

  def drop(self, line: int) -> None:
    """Lets go of a line."""
    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, line)

  def close(self) -> None:
    """Lets go of all."""
    os.close(self._file)


def made_from(path: pathlib.Path) -> dict[str, Any] | None:
  """What a picture says it was made from; None if there is no picture.

  Raises:
    ValueError: it is not one of ours.
  """
  try:
    with Image.open(path) as image:
      return json.loads(getattr(image, 'text', {})[_TEXT])
  except FileNotFoundError:
    return None
  except (KeyError, ValueError, OSError) as error:
    raise ValueError(
      f'{path} was not made by scar sample; accepted: a folder of its own '
      '(set --out)'
    ) from error


class Work:
  """One process's share of a job.

  Attributes:
    failed: key -> reason of requests that cannot be made.
    made: pictures that this process has made.
  """

  def __init__(
    self,
    editor: 'Editor',
    out: pathlib.Path,
    origin: Mapping[str, str],
    settings: Mapping[str, Any],
  ):
    """No request yet.

    Args:
      editor: the model.
      out: folder of the pictures.
      origin: what all pictures share, such as the hash of the settings.
      settings: of `Editor.__call__`.
    """
    self._editor, self._out = editor, out
    self._origin, self._settings = dict(origin), dict(settings)
    self.failed: dict[str, str] = {}
    self.made = 0

  def run(
    self, requests: Sequence[Request], tell: Callable[[int], None]
  ) -> None:
    """Makes all requests that nobody else makes, and waits for the others.

    Args:
      requests: not made when they were looked at.
      tell: called with the number of requests that are settled since the last
        call, by this process or another.

    Raises:
      ValueError: the folder holds a picture of another request by that name.
    """
    groups: dict[tuple[Any, ...], list[Request]] = {}
    for request in requests:
      groups.setdefault(request.shape, []).append(request)
    with contextlib.closing(Claims(self._out)) as claims:
      for group in groups.values():
        left = collections.deque(group)
        while left:
          some, busy = self._claim(claims, left, tell)
          if some:
            self._make(some)
            for request in some:
              claims.drop(request.line)
            tell(len(some))
          elif busy and not left:
            time.sleep(_WAIT_SECS)
          left.extend(busy)

  def _claim(
    self,
    claims: Claims,
    left: collections.deque[Request],
    tell: Callable[[int], None],
  ) -> tuple[list[Request], list[Request]]:
    """A batch of ours, taken from `left`, and what others hold."""
    some: list[Request] = []
    busy: list[Request] = []
    while left and len(some) < self._editor.cfg.batch:
      request = left.popleft()
      if not claims.take(request.line):
        busy.append(request)
      elif self.is_made(request):
        claims.drop(request.line)
        tell(1)
      else:
        some.append(request)
    return some, busy

  def is_made(self, request: Request) -> bool:
    """Whether its picture is there.

    Raises:
      ValueError: a picture of another request is in its place.
    """
    found, told = made_from(self._path(request)), self._told(request)
    if found is None:
      return False
    changed = [k for k in {*found, *told} if found.get(k) != told.get(k)]
    if changed:
      raise ValueError(
        f'{self._path(request)} was made from another request: '
        + '; '.join(
          f'{k} was {found.get(k)!r}, is {told.get(k)!r}'
          for k in sorted(changed)
        )
        + '; accepted: the same requests, or another --out'
      )
    return True

  def _path(self, request: Request) -> pathlib.Path:
    return self._out / f'{request.name}.png'

  def _told(self, request: Request) -> dict[str, Any]:
    return {**request.told, **self._origin}

  def _make(self, requests: Sequence[Request]) -> None:
    """Makes a batch; of a bad one, each request by itself."""
    good: list[tuple[Request, Any]] = []
    for request in requests:
      try:
        good.append((request, request.load()))
      except ValueError as error:
        self._fail(request, error)
    try:
      self._call(good)
    except ValueError as error:
      if len(good) == 1:
        self._fail(good[0][0], error)
        return
      for one in good:
        try:
          self._call([one])
        except ValueError as error:
          self._fail(one[0], error)

  def _fail(self, request: Request, error: ValueError) -> None:
    self.failed[request.key] = getattr(error, 'reason', str(error))

  def _call(self, some: Sequence[tuple[Request, Any]]) -> None:
    if not some:
      return
    requests = [request for request, _ in some]
    pictures = [picture for _, (picture, _) in some]
    first = requests[0]
    images = self._editor(
      None if first.image is None else pictures,
      [r.prompt for r in requests],
      # Of one shape: all have a label, or none has.
      labels=[r.label for r in requests if r.label is not None] or None,
      masks=None if first.mask is None else [mask for _, (_, mask) in some],
      control=first.control,
      seed=[r.seed for r in requests],
      output='array',
      **self._settings,
    )
    for request, image in zip(requests, images, strict=True):
      self._write(request, image)
      self.made += 1

  def _write(self, request: Request, image: np.ndarray) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt(_TEXT, json.dumps(self._told(request), sort_keys=True))
    write_atomic(
      self._path(request),
      lambda file: Image.fromarray(image).save(
        file, format='PNG', pnginfo=notes
      ),
      alone=True,  # we hold the claim
    )


def manifest(
  requests: Sequence[Request], out: pathlib.Path
) -> Iterator[dict[str, Any]]:
  """What every picture of a job was made from, in the order of the file."""
  for request in requests:
    found = made_from(out / f'{request.name}.png')
    if found is not None:
      yield {**found, 'file': f'{request.name}.png'}
