"""What is compiled during a run, and why something is compiled again.

In: the monitoring events and cache explanations of JAX. Out: counts by
function, and one warning for each recompilation: which function, which of its
arguments changed. Every host waits while one compiles. Used by `train/loop.py`.
"""

import collections
import contextlib
import logging as python_logging
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

_COMPILED = '/jax/core/compile/backend_compile_duration'
# Where JAX says why it traces again, if `jax_explain_cache_misses` is set; and
# who else then speaks up, about the compilation cache on disk.
_EXPLAINS = 'jax._src.interpreters.partial_eval'
_DISK = ('jax._src.compiler', 'jax._src.compilation_cache')
_MISS, _AGAIN = 'TRACING CACHE MISS', 'previously seen'


class Compilations(python_logging.Filter):
  """Counts and explains while it is entered.

  Attributes:
    warm: whether what a step needs has been compiled; only then is a second
      time worth a word.
    counts: compilations by the name of the function.
    again: one line for each recompilation of a function of this program.
    seconds: spent compiling.
  """

  def __init__(self) -> None:
    super().__init__()
    self.warm = False
    self.counts: collections.Counter[str] = collections.Counter()
    self.again: list[str] = []
    self.seconds = 0.0

  def of(self, name: str) -> int:
    """How often the function of this name was compiled."""
    return self.counts[f'jit({name})']

  @contextlib.contextmanager
  def expected(self, wanted: bool = True) -> Iterator[None]:
    """What is compiled again inside is no surprise, if it is `wanted`."""
    before, self.warm = self.warm, self.warm and not wanted
    yield
    self.warm = before

  def filter(self, record: python_logging.LogRecord) -> bool:
    """Takes JAX's explanations out of the log; tells those of a second time."""
    text = record.getMessage()
    if record.name in _DISK:
      return 'persistent' not in text.lower() and 'cache entry' not in text
    if not text.startswith(_MISS):
      return True
    if self.warm and _AGAIN in text:
      lines = [line.strip() for line in text.splitlines()]
      self.again.append(' '.join(lines[1:]))
      logging.warning('compiled again: %s', self.again[-1])
    return False

  def _listen(self, event: str, seconds: float, **facts: Any) -> None:
    if event == _COMPILED:
      self.counts[facts.get('fun_name', '')] += 1
      self.seconds += seconds

  def __enter__(self) -> 'Compilations':
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    self._explained = jax.config.jax_explain_cache_misses
    jax.config.update('jax_explain_cache_misses', True)
    for name in (_EXPLAINS, *_DISK):
      python_logging.getLogger(name).addFilter(self)
    return self

  def __exit__(self, *_: Any) -> None:
    for name in (_EXPLAINS, *_DISK):
      python_logging.getLogger(name).removeFilter(self)
    jax.config.update('jax_explain_cache_misses', self._explained)
    jax.monitoring.unregister_event_duration_listener(self._listen)
