"""How well a picture keeps to its control map: edges, depth, segments.

In: the maps asked for and the same kind of map read off the generated picture.
Out: a number for each pair, or for a whole set. Called by `suites/controls.py`.
Source: method 10.3 (ControlAR, ControlNet++), compared with torchmetrics
through the fixture `metrics`.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Map = Shaped[np.ndarray, 'H W']


def _same_shape(found: np.ndarray, wanted: np.ndarray) -> None:
  if found.shape != wanted.shape or not found.size:
    raise ValueError(
      f'maps of shapes {found.shape} and {wanted.shape}; accepted: one shape, '
      'not empty'
    )


def binary_f1(
  found: Bool[np.ndarray, 'H W'], wanted: Bool[np.ndarray, 'H W']
) -> float:
  """F1 of edge pixels, 0 to 1; two maps without an edge have 0.

  Raises:
    ValueError: two shapes.
  """
  found, wanted = np.asarray(found, bool), np.asarray(wanted, bool)
  _same_shape(found, wanted)
  total = int(found.sum()) + int(wanted.sum())
  return 2 * int((found & wanted).sum()) / total if total else 0.0


def depth_rmse(found: Map, wanted: Map) -> float:
  """Root mean square difference, in levels of 255 of each map's own maximum.

  Raises:
    ValueError: two shapes.
  """
  _same_shape(found, wanted)
  gap = _stretched(found) - _stretched(wanted)
  return float(np.sqrt(np.mean(gap**2)))


def _stretched(depth: np.ndarray) -> np.ndarray:
  depth = depth.astype(np.float64)
  # A flat map of zeros has no maximum to divide by.
  return depth * (255 / (depth.max() or 1.0))


def confusion(
  found: Int[np.ndarray, 'H W'],
  wanted: Int[np.ndarray, 'H W'],
  classes: int,
  ignore: int | None = None,
) -> Int[np.ndarray, 'classes classes']:
  """Counts of pixels, rows the wanted label, columns the found one.

  Args:
    found: labels.
    wanted: labels.
    classes: labels lie below it.
    ignore: pixels that are to have this label are left out; it may lie outside
      of the classes.

  Raises:
    ValueError: two shapes, or a label out of range.
  """
  _same_shape(found, wanted)
  keep = np.ones(wanted.shape, bool) if ignore is None else wanted != ignore
  pairs = {'found': found[keep], 'wanted': wanted[keep]}
  for name, labels in pairs.items():
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
      raise ValueError(
        f'{name} labels from {labels.min()} to {labels.max()}; accepted: 0 to '
        f'{classes - 1}, and {ignore} where wanted labels are ignored'
      )
  flat = pairs['wanted'].astype(np.int64) * classes + pairs['found']
  counts = np.bincount(flat.reshape(-1), minlength=classes**2)
  return counts.reshape(classes, classes)


def class_iou(
  counts: Int[np.ndarray, 'classes classes'], ignore: int | None = None
) -> Float[np.ndarray, ' classes']:
  """Intersection over union of each class; NaN if absent or ignored."""
  hit = np.diag(counts).astype(np.float64)
  union = counts.sum(0) + counts.sum(1) - hit
  with np.errstate(invalid='ignore', divide='ignore'):
    iou = np.where(union > 0, hit / union, np.nan)
  if ignore is not None and 0 <= ignore < len(iou):
    iou[ignore] = np.nan
  return iou


def mean_iou(
  counts: Int[np.ndarray, 'classes classes'], ignore: int | None = None
) -> float:
  """Mean over the classes that occur; counts are those of the whole set."""
  iou = class_iou(counts, ignore)
  return float(np.nanmean(iou)) if np.isfinite(iou).any() else float('nan')
