"""The process in which a reference runs, and what speaks with it.

In: which work to make. Out: its weights, inputs and outputs as arrays, and the
seconds of a call. The parent starts it with one end of a pipe; it ends when
the other end is closed.
"""

import contextlib
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from scar_jax.bench.theirs.common import Checkout, Given, Made, Setting
from scar_jax.extras import require


class Theirs:
  """The parent's end. What fails over there is raised here."""

  def __init__(self, link: Connection, process: subprocess.Popen[bytes]):
    self._link, self._process = link, process

  def load(self, module: str, checkout: Checkout) -> None:
    """Imports what the works of a module need.

    Raises:
      ValueError: as `Checkout.load`.
    """
    self._ask('load', module, checkout)

  def prepare(self, threads: int) -> str:
    """Loads PyTorch, with so many threads; its version.

    Raises:
      ValueError: it is not installed.
    """
    return self._ask('prepare', threads)

  def make(
    self, module: str, maker: str, checkout: Checkout, size: str, of: Setting
  ) -> Given:
    """Makes a work, the one of the calls below."""
    return self._ask('make', module, maker, checkout, size, of)

  def outputs(self) -> dict[str, np.ndarray]:
    """As in `Made`."""
    return self._ask('outputs')

  def timed(self, call: str = 'call') -> tuple[float, float]:
    """Seconds of a call (or 'compiled'), and those of all its cores."""
    return self._ask('timed', call)

  def _ask(self, name: str, *args: Any) -> Any:
    try:
      self._link.send((name, args))
      kind, answer = self._link.recv()
    except (EOFError, OSError) as error:
      code = self._process.wait()
      raise RuntimeError(
        f'the process of PyTorch ended with exit code {code} '
        '(-9: often for lack of memory)'
      ) from error
    if kind == 'ValueError':
      raise ValueError(answer)
    if kind:
      raise RuntimeError(f'in PyTorch: {kind}: {answer}')
    return answer


@contextlib.contextmanager
def started() -> Iterator[Theirs]:
  """A process of PyTorch, for as long as the context lasts."""
  ours, theirs = Pipe()
  # Their constructors print: that is not the output of this command.
  process = subprocess.Popen(
    [sys.executable, '-m', __name__, str(theirs.fileno())],
    pass_fds=[theirs.fileno()],
    stdout=subprocess.DEVNULL,
  )
  theirs.close()
  try:
    yield Theirs(ours, process)
  finally:
    ours.close()
    try:
      process.wait(timeout=10)
    except subprocess.TimeoutExpired:  # inside a call that nobody waits for
      process.kill()
      process.wait()


class _Server:
  """The other end: a method for each question."""

  _made: Made

  def prepare(self, threads: int) -> str:
    torch = require('torch', 'bench')
    torch.set_num_threads(threads)
    return str(torch.__version__)

  def load(self, module: str, checkout: Checkout) -> None:
    for name in import_module(module).MODULES:
      checkout.load(name)

  def make(
    self, module: str, maker: str, checkout: Checkout, size: str, of: Setting
  ) -> Given:
    made = getattr(import_module(module), maker)(checkout, size, of)
    self._made = made
    return Given(made.weights, made.inputs, made.compiled is not None)

  def outputs(self) -> dict[str, np.ndarray]:
    return self._made.outputs()

  def timed(self, call: str) -> tuple[float, float]:
    run = getattr(self._made, call)
    start, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - used


def _serve(link: Connection) -> None:
  server = _Server()
  while True:
    try:
      name, args = link.recv()
    except EOFError:  # nobody asks any more
      return
    try:
      answer = '', getattr(server, name)(*args)
    except Exception as error:  # whatever the code of others may raise
      logging.exception('%s failed', name)
      answer = type(error).__name__, str(error)
    link.send(answer)


if __name__ == '__main__':
  # The references call what PyTorch has renamed since.
  warnings.simplefilter('ignore')
  _serve(Connection(int(sys.argv[1])))
