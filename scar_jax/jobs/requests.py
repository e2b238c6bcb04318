"""Requests of a JSONL file, each judged on its own.

In: lines such as `{"id": "a", "image": "in.png", "prompt": "dark skin"}`; paths
are relative to the file. Out: `Request`s and what is wrong with the others;
pictures are opened later, when their turn comes. Called by
`commands/sample.py` and `jobs/work.py`.
"""

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from scar_jax.config_values import nearest
from scar_jax.data.controls import FROM_PHOTO
from scar_jax.data.lines import Lines, parse
from scar_jax.data.masks import decode_mask
from scar_jax.data.records import RecordError
from scar_jax.data.text import checked_text
from scar_jax.data.transforms import decode

FIELDS = ('id', 'image', 'mask', 'control', 'prompt', 'label', 'seed')


@dataclasses.dataclass(frozen=True)
class Request:
  """One line that can be tried.

  Attributes:
    name: of its picture, without the ending.
    line: number in the file, from 1.
    key: how messages call it.
    home: folder that its paths are relative to.
    image: condition picture.
    mask: what is drawn anew.
    control: map that is made of the picture first.
    prompt: instruction or caption.
    label: class.
    seed: of the picture.
  """

  name: str
  line: int
  key: str
  home: pathlib.Path
  image: str | None
  mask: str | None
  control: str | None
  prompt: str | None
  label: int | None
  seed: int

  @property
  def shape(self) -> tuple[Any, ...]:
    """Requests that agree in it may be made together."""
    given = (self.image, self.mask, self.label)
    return (*(x is not None for x in given), self.control)

  @property
  def told(self) -> dict[str, Any]:
    """Its fields, as a manifest shows them."""
    names = ('image', 'mask', 'control', 'prompt', 'label', 'seed')
    fields = {name: getattr(self, name) for name in names}
    return {
      'id': self.name,
      'line': self.line,
      **{name: value for name, value in fields.items() if value is not None},
    }

  def load(self) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Picture and mask.

    Raises:
      RecordError: one of them cannot be read.
    """
    picture = mask = None
    try:
      if self.image is not None:
        picture = decode(self.home / self.image)
        if self.mask is not None:
          size = picture.shape[:2]
          mask = decode_mask(self.home / self.mask, size, self.mask)
    except RecordError as error:
      raise RecordError(self.key, f'{error.key}: {error.reason}') from None
    return picture, mask


def read_requests(
  path: pathlib.Path, seed: int = 0
) -> tuple[list[Request], dict[str, str]]:
  """Judges every line.

  Args:
    path: the file.
    seed: of the line with number 1; line n without a seed has `seed + n - 1`.

  Returns:
    What can be tried, and the reason for each line that cannot.

  Raises:
    ValueError: no such file, or no line with content.
  """
  if not path.is_file():
    raise ValueError(f'--requests={str(path)!r}: no such file')
  lines = Lines(path)
  if not len(lines):
    raise ValueError(f'--requests={str(path)!r} has no line with content')
  good: list[Request] = []
  failed: dict[str, str] = {}
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
      failed[error.key] = error.reason
  return good, failed


def _request(
  row: dict[str, Any], key: str, number: int, home: pathlib.Path, seed: int
) -> Request:
  for name in row:
    if name not in FIELDS:
      raise RecordError(
        key,
        f'unknown field {name!r}.{nearest(name, FIELDS)} '
        f'Accepted: {", ".join(FIELDS)}',
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
  paths = {field: row.get(field) for field in ('image', 'mask')}
  for field, path in paths.items():
    if path is not None and not isinstance(path, str):
      raise RecordError(key, f'{field} {path!r:.60}; accepted: a path')
  if paths['mask'] is not None and paths['image'] is None:
    raise RecordError(key, 'a mask without an image; accepted: both')
  control = row.get('control')
  if control is not None and control not in FROM_PHOTO:
    raise RecordError(
      key, f'control {control!r:.60}; accepted: {", ".join(FROM_PHOTO)}'
    )
  chosen = numbers['seed']
  return Request(
    name=name,
    line=number,
    key=key,
    home=home,
    image=paths['image'],
    mask=paths['mask'],
    control=control,
    prompt=checked_text(row.get('prompt'), key),
    label=numbers['label'],
    seed=seed + number - 1 if chosen is None else chosen,
  )
