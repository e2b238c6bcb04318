"""What a run tells: stages, scalars, pictures, progress.

In: scalars of steps and small pictures. Out: `metrics.jsonl` always,
TensorBoard events if `tensorboardX` is installed, PNGs in `pictures/`, a
progress bar on a terminal or log lines elsewhere. Only host 0 writes.
"""

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from scar_jax import paths


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
  """Logs a stage and its seconds, so that a stuck job names where it is."""
  start = time.monotonic()
  logging.info('%s ...', name)
  yield
  logging.info('%s: %.1f s', name, time.monotonic() - start)


class Writer:
  """Scalars and pictures of one run.

  Args:
    workdir: of the run.
    active: False writes nothing (hosts other than 0).
  """

  def __init__(self, workdir: paths.PathLike, active: bool = True):
    self.workdir = paths.folder(workdir)
    self.active = active
    self._board: Any = None
    if active:
      self.workdir.mkdir(parents=True, exist_ok=True)
      self._lines = _Lines(self.workdir / 'metrics.jsonl')
      # In a bucket it needs google-cloud-storage, and says so likewise.
      with contextlib.suppress(ImportError):
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(self.workdir / 'tensorboard'))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """One line of JSON; numbers that are not finite become null."""
    if not self.active:
      return
    clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._lines.add(json.dumps({'step': step, **clean}))
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
    folder.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    Image.fromarray(grid).save(png, format='PNG')
    (folder / f'{step:08d}.png').write_bytes(png.getvalue())
    if self._board is not None:
      self._board.add_image('/'.join(images), grid, step, dataformats='HWC')

  def flush(self) -> None:
    """Brings to a bucket what it has not seen; files are written at once."""
    if self.active:
      self._lines.flush()

  def close(self) -> None:
    """Flushes what is open."""
    if self.active:
      self._lines.close()
      if self._board is not None:
        self._board.close()


class _Lines:
  """A file that grows; in a bucket, which cannot append, it is rewritten."""

  def __init__(self, path: epath.Path):
    self._path, self._fresh = path, False
    self._text: list[str] = []
    self._file: Any = None
    if not paths.is_remote(path):
      self._file = path.open('a')
    elif path.exists():
      self._text = [path.read_text()]

  def add(self, line: str) -> None:
    if self._file is not None:
      self._file.write(line + '\n')
      self._file.flush()
    else:
      self._text.append(line + '\n')
      self._fresh = True

  def flush(self) -> None:
    if self._fresh:
      self._path.write_text(''.join(self._text))
      self._fresh = False

  def close(self) -> None:
    self.flush()
    if self._file is not None:
      self._file.close()


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

  def add(self, values: Mapping[str, float]) -> None:
    """Adds the scalars of one step."""
    for name, value in values.items():
      self._values.setdefault(name, []).append(value)

  def take(self) -> dict[str, float]:
    """Means since the last call."""
    means = {}
    for name, values in self._values.items():
      # A skipped step has no loss; it is told by its counter.
      good = [v for v in values if math.isfinite(v)]
      picked = values[-1:] if name in self._LAST else good
      means[name] = float(np.mean(picked)) if picked else math.nan
    self._values = {}
    return means


def write_json(path: epath.Path, value: Any) -> None:
  """Writes JSON whole or not at all."""
  text = json.dumps(value, indent=1, sort_keys=True) + '\n'
  paths.write_text(path, text)
