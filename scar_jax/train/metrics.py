"""What a run tells: stages, scalars, pictures, progress, compilations.

In: scalars of steps and small pictures. Out: `metrics.jsonl` always,
TensorBoard events if `tensorboardX` is installed, PNGs in `pictures/`, a
progress bar on a terminal or log lines elsewhere. Only host 0 writes.
"""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

_COMPILED = '/jax/core/compile/backend_compile_duration'


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
  """Logs a stage and its seconds, so that a stuck job names where it is."""
  start = time.monotonic()
  logging.info('%s ...', name)
  yield
  logging.info('%s: %.1f s', name, time.monotonic() - start)


class CompileCounter:
  """Counts compilations of functions by name while it is entered.

  Args:
    name: of the function, as jit sees it.
  """

  def __init__(self, name: str):
    self._name = f'jit({name})'
    self.count = 0

  def _listen(self, event: str, _: float, **facts: Any) -> None:
    if event == _COMPILED and facts.get('fun_name') == self._name:
      self.count += 1

  def __enter__(self) -> 'CompileCounter':
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_: Any) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)


class Writer:
  """Scalars and pictures of one run.

  Args:
    workdir: of the run.
    active: False writes nothing (hosts other than 0).
  """

  def __init__(self, workdir: str | pathlib.Path, active: bool = True):
    self.workdir = pathlib.Path(workdir)
    self.active = active
    self._board: Any = None
    if active:
      self.workdir.mkdir(parents=True, exist_ok=True)
      self._file = (self.workdir / 'metrics.jsonl').open('a')
      with contextlib.suppress(ImportError):
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(self.workdir / 'tensorboard'))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """One line of JSON; numbers that are not finite become null."""
    if not self.active:
      return
    clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._file.write(json.dumps({'step': step, **clean}) + '\n')
    self._file.flush()
    if self._board is not None:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)

  def pictures(
    self, step: int, images: Mapping[str, UInt8[np.ndarray, 'n H W 3']]
  ) -> None:
    """One PNG: a row of pictures for each name, in the order given."""
    if not self.active or not images:
      return
    rows = [np.concatenate(list(x), axis=1) for x in images.values()]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(r, ((0, 2), (0, width - r.shape[1]), (0, 0))) for r in rows]
    grid = np.concatenate(rows)
    folder = self.workdir / 'pictures'
    folder.mkdir(exist_ok=True)
    Image.fromarray(grid).save(folder / f'{step:08d}.png')
    if self._board is not None:
      self._board.add_image('/'.join(images), grid, step, dataformats='HWC')

  def close(self) -> None:
    """Flushes what is open."""
    if self.active:
      self._file.close()
      if self._board is not None:
        self._board.close()


class Progress:
  """Rate, loss and remaining time: a bar on a terminal, else nothing.

  Args:
    total: steps of the run.
    done: steps already made.
    active: False shows nothing.
  """

  def __init__(self, total: int, done: int = 0, active: bool = True):
    self._bar: Any = None
    if active and sys.stderr.isatty():
      from rich import progress
      from rich.console import Console

      self._bar = progress.Progress(
        progress.TextColumn('step'),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TextColumn('{task.fields[text]}'),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
      )
      self._task = self._bar.add_task('', total=total, completed=done, text='')
      self._bar.start()

  def update(self, done: int, text: str) -> None:
    """Moves the bar to `done` steps, with rate and loss as text."""
    if self._bar is not None:
      self._bar.update(self._task, completed=done, text=text)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.stop()


class Means:
  """Means of scalars between two log lines; the last of counters."""

  _LAST = ('skipped', 'bad_in_row', 'lr')

  def __init__(self) -> None:
    self._values: dict[str, list[float]] = {}
    self._start = time.monotonic()

  def add(self, values: Mapping[str, float]) -> None:
    """Adds the scalars of one step."""
    for name, value in values.items():
      self._values.setdefault(name, []).append(value)

  def __bool__(self) -> bool:
    return bool(self._values)

  def take(self, batch: int) -> dict[str, float]:
    """Means since the last call, with steps and images per second."""
    steps = max(map(len, self._values.values()))
    seconds = max(time.monotonic() - self._start, 1e-9)
    means = {}
    for name, values in self._values.items():
      # A skipped step has no loss; it is told by its counter.
      good = [v for v in values if math.isfinite(v)]
      picked = values[-1:] if name in self._LAST else good
      means[name] = float(np.mean(picked)) if picked else math.nan
    means['steps_per_second'] = steps / seconds
    means['images_per_second'] = batch * steps / seconds
    self.__init__()
    return means


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON beside its place and renames it."""
  part = path.with_name(f'{path.name}.part')
  part.write_text(json.dumps(value, indent=1, sort_keys=True) + '\n')
  part.rename(path)
