"""`scar sample`: a JSONL file of requests to a folder of images.

In: lines such as `{"id": "a", "image": "in.png", "prompt": "dark skin",
"seed": 3}`; every field may be absent, paths are relative to the file. A `mask`
(white is drawn anew) needs a model of the random order. Out: `<id>.png` for
each, and `failed.jsonl` with the lines that could not be made. What is already
there is not made again, so a killed job goes on.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np
from absl import flags

from scar_jax.commands import sampling_flags as shared
from scar_jax.commands.parsing import Args

ABOUT = 'Make images for a JSONL file of requests; goes on where it stopped.'
EXAMPLE = (
  'scar sample --workdir=runs/edit --requests=requests.jsonl --out=images'
)
WITH_CONFIG = False
_FIELDS = ('id', 'image', 'mask', 'prompt', 'label', 'seed')


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  shared.define(values)
  for name, about in {
    'requests': f'JSONL file; fields {", ".join(_FIELDS)}.',
    'out': 'Folder for the images.',
  }.items():
    flags.DEFINE_string(name, None, about, flag_values=values)


@dataclasses.dataclass
class Request:
  """One line that can be made."""

  name: str
  picture: np.ndarray | None
  mask: np.ndarray | None
  prompt: str | None
  label: int | None
  seed: int


def run(args: Args) -> str:
  """Makes the images; returns the closing line.

  Raises:
    ValueError: some requests could not be made; the others are.
  """
  from scar_jax.commands.console import say

  given = args.flags
  shared.required(given, EXAMPLE, 'workdir', 'requests', 'out')
  out = pathlib.Path(given.out)
  editor = shared.load_editor(given)
  used = {
    **shared.settings(given),
    'seed': given.seed,
    'model': str(given.workdir),
  }
  shared.same_settings(out, used)
  good, failed = read_requests(pathlib.Path(given.requests), given.seed)
  left = [r for r in good if not (out / f'{r.name}.png').exists()]
  say(
    f'{len(good) + len(failed)} requests: {len(good) - len(left)} made before, '
    f'{len(left)} to make, {len(failed)} that cannot be made; into {out}'
  )
  _make(editor, left, out, shared.settings(given))
  report = out / 'failed.jsonl'
  report.unlink(missing_ok=True)
  if failed:
    lines = [json.dumps({'request': k, 'reason': r}) for k, r in failed]
    report.write_text('\n'.join(lines) + '\n')
    listed = '; '.join(f'{key}: {reason}' for key, reason in failed[:5])
    raise ValueError(
      f'{len(failed)} of {len(good) + len(failed)} requests could not be made, '
      f'the others are in {out}: {listed} (all in {report})'
    )
  return f'{len(left)} images in {out}'


def _make(editor: Any, left: list[Request], out: pathlib.Path, settings: Any):
  from rich.progress import track

  from scar_jax.eval.report import write_atomic

  size = editor.cfg.batch
  starts = range(0, len(left), size)
  for start in track(starts, 'sampling', disable=not left, transient=True):
    some = left[start : start + size]
    for masked in (False, True):
      group = [r for r in some if (r.mask is not None) == masked]
      if not group:
        continue
      pictures = [r.picture for r in group]
      labels = [r.label for r in group]
      images = editor(
        None if any(p is None for p in pictures) else pictures,
        [r.prompt for r in group],
        labels=None if any(x is None for x in labels) else labels,
        masks=[r.mask for r in group] if masked else None,
        seed=[r.seed for r in group],
        **settings,
      )
      for request, image in zip(group, images, strict=True):
        write_atomic(
          out / f'{request.name}.png',
          lambda file, image=image: image.save(file, format='PNG'),
        )


def read_requests(
  path: pathlib.Path, seed: int = 0
) -> tuple[list[Request], list[tuple[str, str]]]:
  """Judges every line on its own.

  Args:
    path: the file.
    seed: of the line with number 1; line n without a seed has `seed + n - 1`.

  Returns:
    What can be made, and (where, reason) of what cannot.

  Raises:
    ValueError: no such file, or no line with content.
  """
  from scar_jax.data.lines import Lines, parse
  from scar_jax.data.records import RecordError

  if not path.is_file():
    raise ValueError(f'--requests={str(path)!r}: no such file')
  lines = Lines(path)
  if not len(lines):
    raise ValueError(f'--requests={str(path)!r} has no line with content')
  good: list[Request] = []
  failed: list[tuple[str, str]] = []
  seen: dict[str, int] = {}
  for i in range(len(lines)):
    number = lines.number(i)
    key = f'{path.name} line {number}'
    try:
      row, _ = parse(lines.read(i), key)
      request = _request(row, key, number, path.parent, seed)
      if request.name in seen:
        raise RecordError(
          key, f'id {request.name!r} is that of line {seen[request.name]} too'
        )
      seen[request.name] = number
      good.append(request)
    except RecordError as error:
      failed.append((error.key, error.reason))
  return good, failed


def _request(
  row: dict[str, Any], key: str, number: int, home: pathlib.Path, seed: int
) -> Request:
  from scar_jax.config_values import nearest
  from scar_jax.data.masks import decode_mask
  from scar_jax.data.records import RecordError
  from scar_jax.data.text import checked_text
  from scar_jax.data.transforms import decode

  for name in row:
    if name not in _FIELDS:
      raise RecordError(
        key,
        f'unknown field {name!r}.{nearest(name, _FIELDS)} '
        f'Accepted: {", ".join(_FIELDS)}',
      )
  name = row.get('id', f'{number:06d}')
  if not isinstance(name, str) or not re.fullmatch(r'[\w.\- ]{1,100}', name):
    raise RecordError(
      key, f'id {name!r:.60}; accepted: letters, digits, and . - _ and space'
    )
  numbers = {'label': row.get('label'), 'seed': row.get('seed')}
  for field, value in numbers.items():
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and (not whole or value < 0):
      raise RecordError(
        key, f'{field} {value!r:.60}; accepted: a whole number, 0 or more'
      )
  prompt = checked_text(row.get('prompt'), key)
  image, mask = row.get('image'), row.get('mask')
  for field, path in (('image', image), ('mask', mask)):
    if path is not None and not isinstance(path, str):
      raise RecordError(key, f'{field} {path!r:.60}; accepted: a path')
  if mask is not None and image is None:
    raise RecordError(key, 'a mask without an image; accepted: both')
  try:
    picture = None if image is None else decode(home / image)
    if picture is not None and mask is not None:
      mask = decode_mask(home / mask, picture.shape[:2], mask)
  except RecordError as error:
    raise RecordError(key, f'{error.key}: {error.reason}') from None
  chosen = numbers['seed']
  return Request(
    name=name,
    picture=picture,
    mask=mask,
    prompt=prompt,
    label=numbers['label'],
    seed=seed + number - 1 if chosen is None else chosen,
  )
