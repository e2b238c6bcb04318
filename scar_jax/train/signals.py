"""A request to stop (SIGTERM, SIGINT), obeyed between two steps.

In: a signal of a scheduler or a user. Out: the answer to "stop before this
step?", the same on every process, so that all save the same step and end
cleanly. A second signal acts as it would without this. Entered by
`train/loop.py` around the loop.

Where processes were joined, JAX's preemption service hears SIGTERM on any one
of them and names a step that none has passed yet.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils


class StopRequest:
  """Nothing until a signal comes; then the end of the loop.

  Attributes:
    name: of the signal, or ''.
  """

  _SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self) -> None:
    self.name = ''
    self._joined = jax.distributed.is_initialized()
    self._before: dict[int, Any] = {}

  def before(self, step: int) -> bool:
    """Whether to end instead of taking this step; asked at every step."""
    heard = multihost_utils.reached_preemption_sync_point
    if self._joined and not self.name and heard(step):
      self.name = 'SIGTERM'  # of this process or another
      logging.warning('SIGTERM: all processes save before step %d', step)
    return bool(self.name)

  def _note(self, number: int, _: FrameType | None) -> None:
    self._give_back()
    if self._joined:
      # Said to all through the service, which hears SIGTERM only.
      os.kill(os.getpid(), signal.SIGTERM)
      return
    self.name = signal.Signals(number).name
    logging.warning('%s: saving after this step', self.name)

  def _give_back(self) -> None:
    for number, before in self._before.items():
      signal.signal(number, before)
    self._before = {}

  def __enter__(self) -> 'StopRequest':
    # Only the main thread may set handlers; elsewhere signals act as usual.
    if threading.current_thread() is threading.main_thread():
      ours = self._SIGNALS[1:] if self._joined else self._SIGNALS
      self._before = {n: signal.signal(n, self._note) for n in ours}
    return self

  def __exit__(self, *_: Any) -> None:
    self._give_back()
