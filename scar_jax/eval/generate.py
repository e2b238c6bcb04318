"""Pictures of a data set's records by a model: resumable, in shares.

In: an `Editor`, a source, where asked a folder. Out: `Items`, the records and
what was made of each. What lies in the folder is not made again, so a killed
job goes on, and several processes may fill one folder, each its share. Called
by `scar eval`.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from scar_jax.data.geometry import fit_pictures
from scar_jax.data.records import Record, RecordError, Source
from scar_jax.data.transforms import decode
from scar_jax.eval.report import write_atomic

Picture = UInt8[np.ndarray, 'H W 3']


class Pictures:
  """Pictures by number, in a folder or, without one, in memory."""

  def __init__(self, folder: pathlib.Path | None):
    self._folder = folder
    self._held: dict[int, np.ndarray] = {}

  def path(self, i: int) -> pathlib.Path | None:
    """Where picture i lies, or will."""
    return None if self._folder is None else self._folder / f'{i:06d}.png'

  def __contains__(self, i: int) -> bool:
    path = self.path(i)
    return i in self._held if path is None else path.exists()

  def __getitem__(self, i: int) -> Picture:
    path = self.path(i)
    return self._held[i] if path is None else decode(path)

  def put(self, i: int, picture: Picture) -> None:
    """Keeps it, on disk whole or not at all."""
    path = self.path(i)
    if path is None:
      self._held[i] = picture
    else:
      image = Image.fromarray(picture)
      write_atomic(path, lambda file: image.save(file, format='PNG'))


@dataclasses.dataclass
class Items:
  """Usable records of a split with the pictures made of them.

  Attributes:
    source: of the records.
    numbers: of the usable records.
    pictures: by these numbers.
    fit: see `prepared`.
    bad: records that could not be used, with the reason.
  """

  source: Source
  numbers: list[int]
  pictures: Pictures
  fit: Mapping[str, Any] | None
  bad: list[str]

  def __len__(self) -> int:
    return len(self.numbers)

  def record(self, at: int) -> Record:
    """The record at a place, as the model saw it."""
    return prepared(self.source, self.numbers[at], self.fit)

  def picture(self, at: int) -> Picture:
    """What was made of it."""
    return self.pictures[self.numbers[at]]

  def __iter__(self) -> Iterator[tuple[Record, Picture]]:
    """Pairs, one in memory at a time."""
    return ((self.record(at), self.picture(at)) for at in range(len(self)))


def prepared(
  source: Source, i: int, fit: Mapping[str, Any] | None = None
) -> Record:
  """Record i with its pictures fitted as in training, and its map drawn.

  Args:
    source: of the record.
    i: its number.
    fit: arguments of `geometry.fit_pictures`; None leaves pictures and masks
      as they are.

  Raises:
    RecordError: it cannot be used.
  """
  record = source.load(i, None)
  pictures = {'target': record.target}
  if record.condition is not None:
    pictures['condition'] = record.condition
  if fit is not None:
    pictures = fit_pictures(pictures, **fit)
  if record.draw is not None:
    pictures['condition'] = record.draw(pictures['target'])
  return dataclasses.replace(record, **pictures)


def generate(
  editor: Any,
  source: Source,
  pictures: Pictures,
  *,
  limit: int = 0,
  fit: Mapping[str, Any] | None = None,
  share: tuple[int, int] = (0, 1),
  seed: int = 0,
  settings: Mapping[str, Any] | None = None,
) -> Items:
  """Makes what is not there yet.

  Args:
    editor: the model.
    source: records of one split.
    pictures: where they are kept.
    limit: records; 0 is all.
    fit: see `prepared`.
    share: (k, n) makes every n-th record from k on, and leaves the others out.
    seed: record i has `seed + i`, whatever is made together with it.
    settings: of the sampler.

  Raises:
    ValueError: no usable record.
  """
  from rich.progress import track

  count = min(len(source), limit or len(source))
  numbers, bad, waiting = [], [], []
  first, every = share

  def make() -> None:
    if waiting:
      made = _call(editor, waiting, seed, settings or {})
      for (i, _), picture in zip(waiting, made, strict=True):
        pictures.put(i, picture)
      waiting.clear()

  for i in track(
    range(first, count, every), 'generating', transient=True, disable=not count
  ):
    try:
      record = prepared(source, i, fit)
    except RecordError as error:
      bad.append(str(error))
      continue
    numbers.append(i)
    if i not in pictures:
      waiting.append((i, record))
    if len(waiting) == editor.cfg.batch:
      make()
  make()
  if not numbers:
    raise ValueError(
      f'{source.describe()}: no usable record to score; {"; ".join(bad[:3])}'
    )
  if bad:
    logging.warning(
      '%d of %d records cannot be used: %s', len(bad), count, '; '.join(bad[:5])
    )
  return Items(source, numbers, pictures, fit, bad)


def _call(
  editor: Any,
  some: Sequence[tuple[int, Record]],
  seed: int,
  settings: Mapping[str, Any],
) -> list[np.ndarray]:
  conditions = [r.condition for _, r in some]
  labels = [r.label for _, r in some]
  images = editor(
    None if any(c is None for c in conditions) else conditions,
    [r.text for _, r in some],
    labels=None if any(x is None for x in labels) else labels,
    seed=[seed + i for i, _ in some],
    **settings,
  )
  return [np.asarray(image.convert('RGB')) for image in images]
