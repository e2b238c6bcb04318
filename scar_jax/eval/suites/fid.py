"""Suite 'fid': do generated pictures look like real ones, as a set?

In: items, Inception, and statistics of real pictures: a file, a folder, or the
records' own targets. Out: FID and IS with the number of pictures. Called by
`scar eval`. Source: method 10.1, 10.2.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scar_jax.data.controls import PICTURES
from scar_jax.data.transforms import decode
from scar_jax.eval import published
from scar_jax.eval.generate import Items
from scar_jax.eval.metrics.frechet import (
  Statistics,
  frechet_distance,
  read_statistics,
)
from scar_jax.eval.metrics.inception import Inception, inception_score
from scar_jax.eval.suites import Scored
from scar_jax.eval.tables import Column, Table

_SPLITS = 10  # of IS
_COLUMNS = (
  Column('canny', 'canny', 'down'),
  Column('depth', 'depth', 'down'),
  Column('hed', 'HED', 'down'),
  Column('sketch', 'sketch', 'down'),
  Column('lineart', 'line art', 'down'),
  Column('fid', 'FID', 'down'),
  Column('inception_score', 'IS', 'up'),
  Column('n', 'n', digits=0),
)


def folder_pictures(folder: pathlib.Path) -> Iterator[np.ndarray]:
  """All pictures of a folder, those of its folders included, by name.

  Raises:
    ValueError: it has none.
  """
  paths = [p for p in sorted(folder.rglob('*')) if p.suffix.lower() in PICTURES]
  if not paths:
    raise ValueError(
      f'--reference={str(folder)!r} has no picture; accepted: files that end '
      f'in {", ".join(PICTURES)}, or an .npz of statistics'
    )
  return (decode(path) for path in paths)


class Fid:
  """Distance to one set of real pictures.

  Args:
    inception: the network.
    reference: .npz with mu and sigma, or a folder; '' is the records' targets.
    control: kind of the control map, '' is none: the column of the tables.
    of_classes: compare with the tables of class-conditional models.
  """

  fitted = True
  has_truth = True

  def __init__(
    self,
    inception: Inception,
    reference: str = '',
    control: str = '',
    of_classes: bool = False,
  ):
    self._inception = inception
    self._control, self._of_classes = control, of_classes
    self._place = reference or 'the targets of the records'
    self._real: Statistics | None = None
    if reference:
      place = pathlib.Path(reference)
      if place.is_dir():
        self._real, _ = inception.read(folder_pictures(place))
      else:
        self._real = read_statistics(place)

  def score(self, items: Items) -> Scored:
    """See `suites.Suite`."""
    real = self._real
    if real is None:
      real, _ = self._inception.read(record.target for record, _ in items)
    made, logits = self._inception.read(
      items.picture(i) for i in range(len(items))
    )
    scores: dict[str, Any] = {
      'n': made.n,
      'n_real': real.n,
      'fid': frechet_distance(made, real),
    }
    if len(logits) >= _SPLITS:
      mean, deviation = inception_score(logits, _SPLITS)
      scores |= {
        'inception_score': mean,
        'inception_score_deviation': deviation,
      }
    return Scored(scores)

  def tables(
    self, scores: Mapping[str, Mapping[str, Any]], name: str
  ) -> dict[str, Table]:
    """See `suites.Suite`: our FID stands below that of the same map."""
    rows = published.C2I if self._of_classes else published.T2I
    known = any(self._control in row for row in rows.values())
    column = self._control if known else 'fid'
    ours = {
      f'{name}, {split}': {**found, column: found['fid'], 'fid': found['fid']}
      for split, found in scores.items()
    }
    what = (
      'ImageNet 256, class and map'
      if self._of_classes
      else 'MultiGen-20M 512, caption and map'
    )
    note = (
      f'Real pictures: {self._place}. FID grows when fewer pictures are '
      'compared; the published rows are on 50,000 (class) or 5,000 (caption).'
    )
    table = Table(
      'method', _COLUMNS, {**rows, **ours}, ours=tuple(ours), notes=(note,)
    )
    return {f'FID, {what}': table}
