"""Suite 'controls': does a picture show the control map that it was made from?

In: items, and the annotator of the kind of map. Out: F1 of canny edges, MS-SSIM
of soft edges and line art, RMSE of depth. The map asked for is read off the
real picture in the same way as that of the generated one. Segments are judged
from two folders of label maps: no segmenter comes with this package. Called by
`scar eval`. Source: method 10.3.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from scar_jax.data import controls
from scar_jax.data.transforms import decode_label
from scar_jax.eval import published
from scar_jax.eval.generate import Items
from scar_jax.eval.metrics import maps, pixels
from scar_jax.eval.suites import Scored
from scar_jax.eval.tables import Column, Table

# Kind of map -> the measure that tables print of it.
MEASURES = {
  'canny': 'f1',
  'sketch': 'f1',
  'hed': 'ssim',
  'lineart': 'ssim',
  'depth': 'rmse',
}
_COLUMNS = (
  Column('f1', 'F1 x10^2', 'up'),
  Column('ssim', 'MS-SSIM x10^2', 'up'),
  Column('rmse', 'RMSE (levels of 255)', 'down'),
  Column('miou', 'mIoU x10^2', 'up'),
  Column('n', 'n', digits=0),
)
_DEPTH_NOTE = (
  'Depth is that of Depth Anything, stretched to 0 to 255; published numbers '
  'are of DPT-large, divided by its maximum, and do not compare.'
)
_WAITING = 64  # pictures that a network has at a time
Drawn = Callable[[list[np.ndarray]], list[np.ndarray]]


def drawer(kind: str, weights: str | None, batch: int) -> Drawn:
  """What draws maps of a kind; networks keep their compiled program.

  Raises:
    ValueError: an unknown kind, or its weights are missing.
  """
  if kind not in MEASURES:
    raise ValueError(
      f'--control={kind!r}; accepted: {", ".join(MEASURES)} (segments: two '
      'folders, --labels and --predicted)'
    )
  if controls.KINDS[kind] == 'network':
    from scar_jax.annotate import make_annotator

    network = make_annotator(kind, weights, batch=batch)

    def draw(pictures: list[np.ndarray]) -> list[np.ndarray]:
      found = dict(network(enumerate(pictures)))
      return [found[i] for i in range(len(pictures))]

    return draw
  plain = controls.canny if kind == 'canny' else controls.line_art
  return lambda pictures: [plain(p)[..., 0] for p in pictures]


def measure(kind: str, found: np.ndarray, wanted: np.ndarray) -> float:
  """The number of one pair of maps, uint8 [H, W], in the units of tables."""
  name = MEASURES[kind]
  if name == 'f1':
    return 100 * maps.binary_f1(found > 0, wanted > 0)
  if name == 'rmse':
    return maps.depth_rmse(found, wanted)
  return 100 * pixels.ms_ssim(found, wanted)


class Consistency:
  """Scores of one kind of map.

  Args:
    kind: a key of `MEASURES`.
    draw: see `drawer`.
  """

  fitted = True
  has_truth = True

  def __init__(self, kind: str, draw: Drawn):
    self._kind, self._draw = kind, draw

  def score(self, items: Items) -> Scored:
    """See `suites.Suite`: a mean over pictures, not over batches."""
    values: list[float] = []
    for some in _chunks(items):
      real = [record.target for record, _ in some]
      made = self._draw(real + [picture for _, picture in some])
      wanted, found = made[: len(real)], made[len(real) :]
      values += [
        measure(self._kind, f, w) for f, w in zip(found, wanted, strict=True)
      ]
    name = MEASURES[self._kind]
    scores = {'n': len(values), name: float(np.mean(values))}
    return Scored(scores, tuple(f'{name} {v:.1f}' for v in values))

  def tables(
    self, scores: Mapping[str, Mapping[str, Any]], name: str
  ) -> dict[str, Table]:
    """See `suites.Suite`."""
    rows = {}
    if self._kind == 'hed':
      rows = {k: {'ssim': v} for k, v in published.HED_SSIM.items()}
    ours = {f'{name}, {split}': found for split, found in scores.items()}
    notes = (_DEPTH_NOTE,) if self._kind == 'depth' else ()
    table = Table(
      'method', _COLUMNS, {**rows, **ours}, ours=tuple(ours), notes=notes
    )
    return {f'Consistency with {self._kind} maps': table}


def segment_scores(
  labels: str, predicted: str, classes: int, ignore: int
) -> dict[str, Any]:
  """MIoU of label maps against those of the same names.

  Args:
    labels: folder of the wanted maps, numbers in one channel.
    predicted: folder of what a segmenter found in the generated pictures.
    classes: labels lie below it.
    ignore: wanted label of pixels that do not count.

  Raises:
    ValueError: folders without maps, a map without its partner, sizes or
      labels that do not fit.
  """
  wanted, found = (_label_files(p) for p in (labels, predicted))
  if not wanted or set(wanted) != set(found):
    lonely = sorted(set(wanted) ^ set(found))[:5]
    raise ValueError(
      f'--labels={labels!r} with {len(wanted)} maps, --predicted={predicted!r} '
      f'with {len(found)}, without a partner {lonely}; accepted: label maps '
      '(.png) of the same names in both'
    )
  counts = np.zeros((classes, classes), np.int64)
  for name in sorted(wanted):
    try:
      pair = [decode_label(place[name], name) for place in (found, wanted)]
      counts += maps.confusion(pair[0], pair[1], classes, ignore)
    except ValueError as error:
      raise ValueError(f'label map {name}: {error}') from error
  iou = maps.class_iou(counts, ignore)
  return {
    'n': len(wanted),
    'miou': 100 * maps.mean_iou(counts, ignore),
    'classes': {
      str(i): 100 * float(v) for i, v in enumerate(iou) if np.isfinite(v)
    },
  }


def segment_table(scores: Mapping[str, Any], name: str) -> dict[str, Table]:
  """The table of `segment_scores`."""
  table = Table('method', _COLUMNS, {name: scores}, ours=(name,))
  return {'Consistency with segments': table}


def _label_files(folder: str) -> dict[str, pathlib.Path]:
  root = pathlib.Path(folder)
  return {p.relative_to(root).as_posix(): p for p in root.rglob('*.png')}


def _chunks(items: Items) -> Iterator[list[Any]]:
  some: list[Any] = []
  for pair in items:
    some.append(pair)
    if len(some) == _WAITING:
      yield some
      some = []
  if some:
    yield some
