"""A request to stop (SIGTERM, SIGINT), obeyed between two steps.

In: a signal of a scheduler or a user. Out: a flag that the loop reads, so that
it saves and ends cleanly. A second signal acts as it would without this.
"""

import signal
import threading
from types import FrameType
from typing import Any

from absl import logging


class StopRequest:
  """False until a signal comes; entered around the loop.

  Attributes:
    name: of the signal, or ''.
  """

  _SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self) -> None:
    self.name = ''
    self._before: dict[int, Any] = {}

  def __bool__(self) -> bool:
    return bool(self.name)

  def _note(self, number: int, _: FrameType | None) -> None:
    self.name = signal.Signals(number).name
    logging.warning('%s: saving after this step', self.name)
    self._give_back()

  def _give_back(self) -> None:
    for number, before in self._before.items():
      signal.signal(number, before)
    self._before = {}

  def __enter__(self) -> 'StopRequest':
    # Only the main thread may set handlers; elsewhere signals act as usual.
    if threading.current_thread() is threading.main_thread():
      self._before = {n: signal.signal(n, self._note) for n in self._SIGNALS}
    return self

  def __exit__(self, *_: Any) -> None:
    self._give_back()
