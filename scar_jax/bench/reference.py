"""Speed beside the public PyTorch code: training, sampling, tokenizer, encoder.

In: checkouts of the references. Out: a row for each work with the seconds of
both sides, their ratio and the largest difference of their outputs. Weights are
random and moved by our converter; inputs, cores and the type of products are
the same, on the CPU. PyTorch runs in a process of its own, as its users have
it; calls of both sides take turns. Only in the works that say so our weights
are in int8 (`precision.py`), a choice that theirs lacks.
"""

import dataclasses
import functools
import gc
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from scar_jax.bench.ours.common import Ours
from scar_jax.bench.theirs.common import CHECKOUTS, Checkout, Given, Setting
from scar_jax.bench.theirs.process import Theirs, started
from scar_jax.bench.timing import Report, machine, timed
from scar_jax.config_values import nearest
from scar_jax.orders.scale import scale_sides


@dataclasses.dataclass(frozen=True)
class Work:
  """What is done on both sides.

  Attributes:
    checkout: whose code it needs, a key of `CHECKOUTS` and the name of a module
      in `ours/` and in `theirs/`.
    make: function of both modules that makes it.
    size: of the model, as the reference names it.
    weights: of ours, 'int8' or as they come.
  """

  checkout: str
  make: str
  size: str
  weights: str = ''

  @property
  def theirs(self) -> str:
    """Module of the reference, which only its process imports."""
    return f'scar_jax.bench.theirs.{self.checkout}'

  def ours(self, given: Given, setting: Setting) -> Ours:
    """Our side of it."""
    module = importlib.import_module(f'scar_jax.bench.ours.{self.checkout}')
    chosen = {'weights': self.weights} if self.weights else {}
    return getattr(module, self.make)(given, setting, **chosen)


# In the order of their size.
WORKS = {
  'vq16/encode': Work('llamagen', 'encode', 'VQ-16'),
  'vq16/decode': Work('llamagen', 'decode', 'VQ-16'),
  'dinov2-b/features': Work('dinov2', 'features', 'B'),
  'llamagen-b/train': Work('llamagen', 'train', 'B'),
  'llamagen-b/sample': Work('llamagen', 'sample', 'B'),
  'llamagen-b/sample-int8': Work('llamagen', 'sample', 'B', 'int8'),
  'var-d12/train': Work('var', 'train', '12'),
  'var-d12/sample': Work('var', 'sample', '12'),
  'var-d12/sample-int8': Work('var', 'sample', '12', 'int8'),
  'llamagen-l/train': Work('llamagen', 'train', 'L'),
  'llamagen-l/sample': Work('llamagen', 'sample', 'L'),
  'llamagen-l/sample-int8': Work('llamagen', 'sample', 'L', 'int8'),
  'var-d16/train': Work('var', 'train', '16'),
  'var-d16/sample': Work('var', 'sample', '16'),
  'var-d16/sample-int8': Work('var', 'sample', '16', 'int8'),
}
# Seconds before each call: PyTorch's threads spin for a while after theirs, on
# cores that the next one needs.
_REST = 0.2
# A timed call: its seconds, and those of all cores.
_Clock = Callable[[], tuple[float, float]]
_SHOWN = (
  *('ours_seconds', 'torch_seconds', 'torch_compile_seconds', 'ratio'),
  *('cpu_ratio', 'max_abs_diff', 'error'),
)


def run(given: Any) -> Report:
  """Measures; `given` are the flags of `scar bench`.

  Raises:
    ValueError: no checkout, one that cannot be imported, an unknown work, more
      threads than cores, or no work at all that could be done.
  """
  works = _wanted(given)
  checkouts = {w: Checkout(w, given[w].value) for w in CHECKOUTS}
  threads = _hold(given.threads)
  if jax.default_backend() != 'cpu':
    raise ValueError(
      f'JAX runs on {jax.default_backend()!r} and the references on the CPU; '
      'accepted: cpu (set JAX_PLATFORMS=cpu)'
    )
  with started() as theirs:
    version = theirs.prepare(threads)
    for work in works.values():
      theirs.load(work.theirs, checkouts[work.checkout])
  shared = {
    name: given[name].value
    for name in ('batch', 'grid', 'compile', 'dropout', 'dtype')
  }
  setting = Setting(**shared, sides=scale_sides(given.grid))
  rows = []
  for name, work in works.items():
    row = _row(work, checkouts[work.checkout], setting, threads, given.repeats)
    logging.info('%s: %s', name, row)
    rows.append({'work': name, 'threads': threads, **row})
  if all('error' in row for row in rows):
    told = '; '.join(f'{row["work"]}: {row["error"]}' for row in rows)
    raise ValueError(f'no work could be measured: {told}')
  settings = {
    **machine(),
    'torch': version,
    'threads': threads,
    'repeats': given.repeats,
    **shared,
  }
  return Report(settings, rows, lambda row: row['work'], _SHOWN)


def _wanted(given: Any) -> dict[str, Work]:
  """The works asked for, or all whose checkout is there."""
  names = given.work or list(WORKS)
  for name in names:
    if name not in WORKS:
      raise ValueError(
        f'--work={name!r}.{nearest(name, WORKS)} accepted: {", ".join(WORKS)}'
      )
    flag = WORKS[name].checkout
    if given.work and not given[flag].value:
      raise ValueError(
        f'--work={name!r} without --{flag}; accepted: the directory of a '
        f'checkout of {CHECKOUTS[flag]}'
      )
  works = {n: WORKS[n] for n in names if given[WORKS[n].checkout].value}
  if not works:
    flags = ', '.join(f'--{k}=DIR of {v}' for k, v in CHECKOUTS.items())
    raise ValueError(f'no checkout of a reference is given; accepted: {flags}')
  return works


def _hold(threads: int | None) -> int:
  """Keeps this process and its children on so many cores; how many those are.

  JAX and PyTorch start as many threads as the cores that they find: with the
  cores, neither can have more than the other.
  """
  if not hasattr(os, 'sched_setaffinity'):
    cores = os.cpu_count() or 1
    if threads not in (None, cores):
      raise ValueError(
        f'--threads={threads}, but this system cannot hold a process on some '
        f'of its cores; accepted: {cores}'
      )
    return cores
  cores = sorted(os.sched_getaffinity(0))
  if threads is None or threads == len(cores):
    return len(cores)
  if threads > len(cores):
    raise ValueError(
      f'--threads={threads}; accepted: 1 to {len(cores)}, the cores of this '
      'process'
    )
  os.sched_setaffinity(0, cores[:threads])
  return threads


def _row(
  work: Work, checkout: Checkout, setting: Setting, threads: int, repeats: int
) -> dict[str, Any]:
  """Figures of one work, or what went wrong: the others are still measured."""
  try:
    # Another process for each work: none starts in what one before has left.
    with started() as theirs:
      theirs.prepare(threads)
      given = theirs.make(work.theirs, work.make, checkout, work.size, setting)
      compiles = given.compiles
      ours = work.ours(given, setting)
      del given  # weights that both sides have now
      return figures(ours, theirs, compiles, setting.batch, repeats)
  except Exception as error:  # whatever the code of others may raise
    logging.exception('%s failed', work)
    return {'error': _told(error)}
  finally:
    # A model and its moments: make room for the next ones.
    gc.collect()
    jax.clear_caches()


def figures(
  ours: Ours, theirs: Theirs, compiles: bool, batch: int, repeats: int
) -> dict[str, Any]:
  """Compares the outputs of both sides, then measures them.

  Args:
    ours: see there.
    theirs: has made the same work.
    compiles: also measure `torch.compile`.
    batch: images of a call.
    repeats: turns of each side, two timed calls each; the fastest counts.
  """
  row: dict[str, Any] = {'batch': batch}
  difference, compared = ours.differ(theirs.outputs())
  clocks: dict[str, _Clock] = {
    'ours': functools.partial(timed, ours.call),
    'torch': theirs.timed,
  }
  if compiles:
    program = functools.partial(theirs.timed, 'compiled')
    try:
      program()
      clocks['torch_compile'] = program
    except Exception as error:  # a compiler that this machine lacks
      logging.exception('torch.compile failed')
      row['torch_compile_error'] = _told(error)
  best = _fastest(clocks, repeats)
  for name, (seconds, cpu) in best.items():
    row |= {f'{name}_seconds': seconds, f'{name}_cpu_seconds': cpu}
  for i, name in enumerate(('ratio', 'cpu_ratio')):
    row[name] = best['torch'][i] / best['ours'][i]
  if 'torch_compile' in best:
    row['torch_compile_ratio'] = best['torch_compile'][0] / best['ours'][0]
  row |= {'max_abs_diff': difference, 'compared': compared}
  if hasattr(os, 'getloadavg'):
    row['load'] = os.getloadavg()[0]
  return row


def _fastest(
  clocks: dict[str, _Clock], repeats: int
) -> dict[str, tuple[float, float]]:
  """Of each side the least seconds, and the least of all its cores together.

  They take turns of two calls: what else runs on the machine only ever adds,
  and so do the caches that the other side has filled, to the first of them.
  """
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in clocks}
  for _ in range(repeats):
    for name, clock in clocks.items():
      for _ in range(2):
        time.sleep(_REST)
        times[name].append(clock())
  return {
    name: (min(wall for wall, _ in some), min(cpu for _, cpu in some))
    for name, some in times.items()
  }


def _told(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0] if lines else ""}'
