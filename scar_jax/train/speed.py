"""How fast a run is, where its time goes, and what of the chip it uses.

In: how long the loop waited for data and for checkpoints, and what a step
costs. Out: scalars of one log line. Used by `train/loop.py`.
"""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from scar_jax.plan.chips import CHIPS, GIB

# FLOP/s of dense bfloat16 matrix products, by the first words of
# `device_kind`; of GPUs from the data sheets (SXM, without sparsity).
_PEAK_FLOPS = {
  'TPU v4': CHIPS['v4'].flops,
  'TPU v5 lite': CHIPS['v5e'].flops,
  'TPU v5e': CHIPS['v5e'].flops,
  'TPU v5': CHIPS['v5p'].flops,
  'TPU v6 lite': CHIPS['v6e'].flops,
  'TPU v6e': CHIPS['v6e'].flops,
  'NVIDIA A100': 3.12e14,
  'NVIDIA H100': 9.89e14,
  'NVIDIA H200': 9.89e14,
}


def peak_flops(device_kind: str) -> float:
  """FLOP/s of one device at its best, bfloat16; 0 if it is not known."""
  named = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
  return _PEAK_FLOPS[max(named, key=len)] if named else 0.0


class Speed:
  """Rates between two log lines.

  Args:
    images: of a step, all devices together.
    tokens: target tokens of an image; 0 if the task has none.
    flops: of a step, all devices together; 0 if they are not known.
    peak: FLOP/s of one device at its best; 0 if it is not known.
    devices: that share the step.
  """

  def __init__(
    self,
    images: int,
    tokens: int = 0,
    flops: float = 0.0,
    peak: float = 0.0,
    devices: int = 1,
  ):
    self._images, self._tokens = images, tokens
    self._flops, self._peak, self._devices = flops, peak, devices
    self._begin()

  def _begin(self) -> None:
    self._start, self._steps = time.monotonic(), 0
    self._spent: collections.Counter[str] = collections.Counter()

  @contextlib.contextmanager
  def spend(self, what: str) -> Iterator[None]:
    """Books the time inside under a name: 'data', 'checkpoint', ..."""
    start = time.monotonic()
    yield
    self._spent[what] += time.monotonic() - start

  def step(self) -> None:
    """Counts a step whose result has arrived."""
    self._steps += 1

  def take(self) -> dict[str, float]:
    """Scalars since the last call.

    `<name>_seconds` are seconds per step: 'data' and 'checkpoint' as booked,
    'step' the rest, so that all of them add up to the time of a step.
    """
    total = max(time.monotonic() - self._start, 1e-9)
    steps, spent = max(self._steps, 1), {'data': 0.0, 'checkpoint': 0.0}
    spent |= self._spent
    rate = self._steps / total
    scalars = {f'{name}_seconds': s / steps for name, s in spent.items()}
    scalars['step_seconds'] = (total - sum(spent.values())) / steps
    scalars['steps_per_second'] = rate
    scalars['images_per_second'] = rate * self._images
    each = rate * self._images / self._devices
    scalars['images_per_second_per_chip'] = each
    if self._tokens:
      scalars['tokens_per_second_per_chip'] = each * self._tokens
    if self._flops:
      per_chip = rate * self._flops / self._devices
      scalars['tflops_per_second_per_chip'] = per_chip / 1e12
      if self._peak:
        scalars['mfu'] = per_chip / self._peak
    self._begin()
    return scalars | memory()


def memory() -> dict[str, float]:
  """Highest memory use of this host's devices; empty where none reports it."""
  stats: list[dict[str, Any]] = [
    d.memory_stats() or {} for d in jax.local_devices()
  ]
  peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
  limits = [s['bytes_limit'] for s in stats if s.get('bytes_limit')]
  found = {}
  if peaks:
    found['memory_peak_gib'] = max(peaks) / GIB
  if limits:
    found['memory_limit_gib'] = min(limits) / GIB
  return found
