"""`scar sample`: a JSONL file of requests to a folder of images.

In: lines such as `{"id": "a", "image": "in.png", "prompt": "dark skin",
"seed": 3}`; every field may be absent, paths are relative to the file. A `mask`
(white is drawn anew) needs a model of the random order; `control` makes a map
of the image first. Out: `<id>.png` for each, `manifest.jsonl` with what each
was made from, `failed.jsonl` with the lines that could not be made. What is
already there is not made again, so a killed job goes on, and the same command
may run several times at once, on one machine or many.
"""

import hashlib
import json
import pathlib
import time
from typing import Any

from absl import flags

from scar_jax.commands import sampling_flags as shared
from scar_jax.commands.parsing import Args

ABOUT = 'Make images for a JSONL file of requests; goes on where it stopped.'
EXAMPLE = (
  'scar sample --workdir=runs/edit --requests=requests.jsonl --out=images'
)
WITH_CONFIG = False
_TELL_SECS = 15.0  # between lines where there is no terminal


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  shared.define(values)
  for name, about in {
    'requests': 'JSONL file; fields id, image, mask, control, prompt, label, '
    'seed.',
    'out': 'Folder for the images; several processes may share it.',
    'mesh': 'Devices that share a batch, such as data:-1 (all of this process) '
    'or data:2,fsdp:4; by default one device.',
  }.items():
    flags.DEFINE_string(name, None, about, flag_values=values)


def run(args: Args) -> str:
  """Makes the images; returns the closing line.

  Raises:
    ValueError: some requests could not be made; the others are.
  """
  from scar_jax.commands.console import say
  from scar_jax.eval.report import write_atomic
  from scar_jax.jobs import work
  from scar_jax.jobs.requests import read_requests

  given = args.flags
  shared.required(given, EXAMPLE, 'workdir', 'requests', 'out')
  out = pathlib.Path(given.out)
  good, failed = read_requests(pathlib.Path(given.requests), given.seed)
  # One batch size, filled up: no picture depends on which others are left.
  editor = shared.load_editor(given, one_size=True)
  used = {
    **shared.settings(given),
    'seed': given.seed,
    'checkpoint': editor.fingerprint,
    **shared.precision(given),
  }
  shared.same_settings(out, used)
  text = json.dumps(used, sort_keys=True)
  job = work.Work(
    editor,
    out,
    {
      'config': hashlib.sha256(text.encode()).hexdigest()[:12],
      'checkpoint': editor.fingerprint,
    },
    shared.settings(given),
  )
  left = [request for request in good if not job.is_made(request)]
  total = len(good) + len(failed)
  say(
    f'{total} requests: {len(good) - len(left)} made before, {len(left)} to '
    f'make, {len(failed)} that cannot be made; into {out}'
  )
  with Meter(len(left), say) as meter:
    job.run(left, meter.add)
  failed |= job.failed
  for name, rows in {
    'manifest.jsonl': list(work.manifest(good, out)),
    'failed.jsonl': [
      {'request': key, 'reason': reason} for key, reason in failed.items()
    ],
  }.items():
    body = ''.join(json.dumps(row, sort_keys=True) + '\n' for row in rows)
    write_atomic(out / name, lambda file, body=body: file.write(body.encode()))
  if failed:
    listed = '; '.join(f'{k}: {v}' for k, v in list(failed.items())[:5])
    raise ValueError(
      f'{len(failed)} of {total} requests could not be made, the others are '
      f'in {out}: {listed} (all in {out / "failed.jsonl"})'
    )
  return f'{job.made} images made, {meter.rate()}; in {out}'


class Meter:
  """Requests settled, their rate and the time that is left."""

  def __init__(self, total: int, say: Any):
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeRemainingColumn

    self._total, self._say, self._done = total, say, 0
    self._started = self._told = time.monotonic()
    console = Console(stderr=True)
    self._quiet = not console.is_terminal
    self._bar = Progress(
      *Progress.get_default_columns()[:2],
      TextColumn('{task.completed}/{task.total}  {task.fields[rate]}'),
      TimeRemainingColumn(),
      console=console,
      disable=self._quiet,
      transient=True,
    )
    self._task = self._bar.add_task('sampling', total=total, rate='')

  def __enter__(self) -> 'Meter':
    self._bar.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.stop()

  def add(self, count: int) -> None:
    """Counts, and shows it."""
    self._done += count
    self._bar.update(self._task, advance=count, rate=self.rate())
    now = time.monotonic()
    if self._quiet and now - self._told > _TELL_SECS:
      self._told = now
      left = (self._total - self._done) * (now - self._started) / self._done
      self._say(
        f'{self._done} of {self._total}, {self.rate()}, {left:.0f} s left'
      )

  def rate(self) -> str:
    """Images per second so far, those of other processes among them."""
    seconds = time.monotonic() - self._started
    return f'{self._done / max(seconds, 1e-3):.2f} images/s'
