"""A trace of some steps, for the JAX profiler's viewers.

In: `--profile=FIRST:LAST`. Out: a trace in `profile/` of the work directory, of
process 0: open it with TensorBoard or xprof. Used by `train/loop.py`.
"""

import os
import pathlib
import re
import tempfile

import jax
from absl import logging
from etils import epath

from scar_jax import paths

Window = tuple[int, int]


def read_window(text: str) -> Window | None:
  """First and last step of `FIRST:LAST`, or None for an empty text.

  Raises:
    ValueError: not two steps in order.
  """
  if not text:
    return None
  found = re.fullmatch(r'(\d+):(\d+)', text)
  first, last = map(int, found.groups()) if found else (0, 0)
  if not 1 <= first <= last:
    raise ValueError(
      f'--profile={text!r}; accepted: FIRST:LAST with 1 <= FIRST <= LAST, '
      'such as 10:12. The first step is 1'
    )
  return first, last


class Profiler:
  """Traces the steps of a window, each from dispatch to its end.

  Args:
    window: first and last step; None traces nothing.
    folder: where the trace goes.

  Attributes:
    tracing: a trace is being taken.
  """

  def __init__(self, window: Window | None, folder: paths.PathLike):
    self._window = window if jax.process_index() == 0 else None
    self._folder = paths.folder(folder)
    self._here = epath.Path(self._folder)  # where the profiler can write
    self.tracing = self._taken = False

  def before(self, step: int) -> None:
    """Starts at the first step of the window."""
    if self._window and not self.tracing and step == self._window[0]:
      if paths.is_remote(self._folder):
        self._here = epath.Path(tempfile.mkdtemp())
      jax.profiler.start_trace(os.fspath(self._here))
      self.tracing = True

  def after(self, step: int, result: object) -> None:
    """Ends after the last step, once its result is there."""
    if self._window and self.tracing and step == self._window[1]:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Ends a trace that the run ended in; tells of one that never began."""
    if not self.tracing:
      if self._window and not self._taken:
        logging.warning('no trace: step %d was not taken', self._window[0])
      return
    jax.profiler.stop_trace()
    self.tracing, self._taken = False, True
    if self._here != self._folder:
      for file in pathlib.Path(self._here).rglob('*.*'):
        there = self._folder / file.relative_to(self._here)
        there.write_bytes(file.read_bytes())
    logging.info('trace of steps %s in %s', self._window, self._folder)
