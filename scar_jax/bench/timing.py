"""What every bench returns, and how it measures time.

In: a function that does the work once. Out: seconds to compile and to run.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Report:
  """Figures of one bench.

  Attributes:
    settings: what was measured, the same for all rows.
    rows: one dict each.
    label: names a row in a table.
  """

  settings: dict[str, Any]
  rows: list[dict[str, Any]]
  label: Callable[[dict[str, Any]], str]


def machine() -> dict[str, Any]:
  """What the figures were taken on."""
  device = jax.devices()[0]
  return {
    'device': device.device_kind,
    'platform': device.platform,
    'jax': jax.__version__,
  }


def measure(
  work: dict[str, Callable[[], Any]],
  repeats: int,
  pick: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, tuple[float, float]]:
  """Seconds of each piece of work: (first call, median of later ones).

  The pieces take turns, so that a slow minute of the machine slows them all.

  Args:
    work: name -> function whose result is waited for.
    repeats: calls of each after the first.
    pick: which of the later calls counts, in place of the median.
  """
  first = {name: _seconds(call) for name, call in work.items()}
  later: dict[str, list[float]] = {name: [] for name in work}
  for _ in range(repeats):
    for name, call in work.items():
      later[name].append(_seconds(call))
  return {name: (first[name], pick(later[name])) for name in work}


def _seconds(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start
