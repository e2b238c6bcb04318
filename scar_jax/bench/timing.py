"""What every bench returns, and how it measures time.

In: a function that does the work once. Out: seconds to compile and to run.
"""

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Report:
  """Figures of one bench.

  Attributes:
    settings: what was measured, the same for all rows.
    rows: one dict each.
    label: names a row in a table.
    shown: keys that are columns of the table; () is all.
  """

  settings: dict[str, Any]
  rows: list[dict[str, Any]]
  label: Callable[[dict[str, Any]], str]
  shown: tuple[str, ...] = ()

  def table(self) -> dict[str, dict[str, Any]]:
    """What is shown of each row, under its label; equal ones are numbered."""
    table: dict[str, dict[str, Any]] = {}
    seen: collections.Counter[str] = collections.Counter()
    for row in self.rows:
      label = self.label(row)
      seen[label] += 1
      name = f'{label} ({seen[label]})' if seen[label] > 1 else label
      table[name] = {
        k: v for k, v in row.items() if not self.shown or k in self.shown
      }
    return table


def machine() -> dict[str, Any]:
  """What the figures were taken on."""
  device = jax.devices()[0]
  return {
    'device': device.device_kind,
    'platform': device.platform,
    'jax': jax.__version__,
  }


def measure(
  work: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, tuple[float, float]]:
  """Seconds of each piece of work: (first call, median of later ones).

  The pieces take turns, so that a slow minute of the machine slows them all.

  Args:
    work: name -> function whose result is waited for.
    repeats: calls of each after the first.
  """
  first = {name: timed(call)[0] for name, call in work.items()}
  later: dict[str, list[float]] = {name: [] for name in work}
  for _ in range(repeats):
    for name, call in work.items():
      later[name].append(timed(call)[0])
  return {name: (first[name], statistics.median(later[name])) for name in work}


def timed(call: Callable[[], Any]) -> tuple[float, float]:
  """Seconds until a result is there, and those of all cores of this process.

  Others on the machine lengthen the first; the second only as far as threads
  that wait for each other spin.
  """
  start, used = time.perf_counter(), time.process_time()
  jax.block_until_ready(call())
  return time.perf_counter() - start, time.process_time() - used
