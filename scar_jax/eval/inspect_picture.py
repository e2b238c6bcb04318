"""An inspection as one picture.

In: an `Inspection`. Out: a PNG file. matplotlib comes with the extra `eval`.
Called by `scar inspect`.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from scar_jax.eval.inspect import Inspection
from scar_jax.eval.report import write_atomic
from scar_jax.extras import require

_COLUMNS = 5
_EXAMPLES = 3  # targets whose own attention is shown
# Maps of one space share their colours.
_SPACES = (('F_s', 'restored', 'F_t'), ('F_c',), ('P_s', 'H_s', 'P_t'))
_TITLES = {
  'F_s': 'F_s: source features',
  'F_c': 'F_c: compressed',
  'restored': 'restored from F_c',
  'F_t': "target's features",
  'P_s': 'P_s: prefix in',
  'H_s': 'H_s: prefix out',
  'P_t': "P_t: target's prefix",
}


def principal(
  maps: Mapping[str, Float[np.ndarray, 'h w d']],
) -> dict[str, UInt8[np.ndarray, 'h w 3']]:
  """Three principal components as colours.

  One basis and one scale for all maps, so that equal colours are equal
  features; 1 % at either end is clipped.
  """
  if not maps:
    return {}
  rows = np.concatenate([m.reshape(-1, m.shape[-1]) for m in maps.values()])
  mean = rows.mean(0)
  _, _, basis = np.linalg.svd(rows - mean, full_matrices=False)
  axes = basis[:3].T
  low, high = np.percentile((rows - mean) @ axes, (1, 99), axis=0)
  found = {}
  for name, m in maps.items():
    scaled = ((m - mean) @ axes - low) / np.maximum(high - low, 1e-12)
    levels = np.zeros((*m.shape[:2], 3), np.uint8)
    # A map with fewer channels has fewer components.
    levels[..., : axes.shape[1]] = np.rint(255 * np.clip(scaled, 0, 1))
    found[name] = levels
  return found


def draw(found: Inspection, title: str, path: str | os.PathLike) -> None:
  """Writes the picture.

  Args:
    found: what was seen.
    title: above all; usually the prompt.
    path: of the PNG file.

  Raises:
    ValueError: matplotlib is not installed.
  """
  require('matplotlib', 'eval')
  from matplotlib.figure import Figure

  panels = [*_pictures(found), *_attention(found), *_prefix(found)]
  rows = -(-len(panels) // _COLUMNS)
  figure = Figure(figsize=(3 * _COLUMNS, 2.9 * rows), layout='constrained')
  axes = figure.subplots(rows, _COLUMNS, squeeze=False).reshape(-1)
  for axis, (name, paint) in zip(axes, panels, strict=False):
    axis.set_title(name, fontsize=9)
    paint(figure, axis)
  for axis in axes[len(panels) :]:
    axis.axis('off')
  figure.suptitle(title)
  write_atomic(path, lambda file: figure.savefig(file, format='png', dpi=120))


def _pictures(found: Inspection) -> list[tuple[str, Any]]:
  return [
    ('source', _image(found.source)),
    ('result', _image(found.result)),
    ('entropy of each token, bits', _heat(_on_grid(found, found.entropy))),
    ('surprise of each token, bits', _heat(_on_grid(found, found.surprise))),
    ('entropy by set, in the order of prediction', _line(found.set_entropy)),
  ]


def _attention(found: Inspection) -> list[tuple[str, Any]]:
  panels = [('share of attention by layer', _shares(found.shares))]
  if not found.to_prefix.shape[1]:
    return panels
  grid = found.prefix_grid
  to_prefix = found.to_prefix.sum(1)
  panels.append(
    ('attention to the prefix, each target', _heat(_on_grid(found, to_prefix)))
  )
  mean = found.to_prefix.mean(0).reshape(grid)
  panels.append(('prefix, as all targets see it', _over(found.source, mean)))
  for at in _spread(found):
    row, column = divmod(int(found.places[at]), found.grid[1])
    seen = found.to_prefix[at].reshape(grid)
    spot = (row + 0.5) / found.grid[0], (column + 0.5) / found.grid[1]
    name = f'prefix, as target ({row}, {column}) sees it'
    panels.append((name, _over(found.source, seen, spot)))
  return panels


def _spread(found: Inspection) -> list[int]:
  """Targets far apart: those that look at the prefix in the clearest way."""
  sharp = found.to_prefix.max(1)
  rows = np.array(np.unravel_index(found.places, found.grid)).T
  chosen: list[int] = []
  for at in np.argsort(-sharp):
    gaps = [np.abs(rows[at] - rows[c]).max() for c in chosen]
    if min(gaps, default=max(found.grid)) >= max(found.grid) / 3:
      chosen.append(int(at))
    if len(chosen) == _EXAMPLES:
      break
  return chosen


def _prefix(found: Inspection) -> list[tuple[str, Any]]:
  panels = []
  maps = found.features | found.states
  for names in _SPACES:
    colours = principal({n: maps[n] for n in names if n in maps})
    panels += [(f'{_TITLES[n]} (PCA)', _image(c)) for n, c in colours.items()]
  panels += [
    (f'cosine of {name}, mean {cosine.mean():.2f}', _heat(cosine))
    for name, cosine in found.cosines.items()
  ]
  return panels


def _on_grid(found: Inspection, values: np.ndarray) -> np.ndarray:
  """Values in prediction order at their places."""
  grid = np.full(found.grid[0] * found.grid[1], np.nan)
  grid[found.places] = values
  return grid.reshape(found.grid)


def _image(picture: np.ndarray) -> Any:
  def paint(_: Any, axis: Any) -> None:
    axis.imshow(picture, interpolation='nearest')
    axis.axis('off')

  return paint


def _heat(values: np.ndarray) -> Any:
  def paint(figure: Any, axis: Any) -> None:
    figure.colorbar(axis.imshow(values, cmap='viridis'), ax=axis, shrink=0.8)
    axis.axis('off')

  return paint


def _over(
  picture: np.ndarray,
  weights: np.ndarray,
  spot: tuple[float, float] | None = None,
) -> Any:
  """Attention laid over the source; a cross marks where the target lies."""

  def paint(_: Any, axis: Any) -> None:
    h, w = picture.shape[:2]
    grey = picture.mean(-1)
    axis.imshow(grey, cmap='gray', vmin=0, vmax=255)
    axis.imshow(
      weights, cmap='inferno', alpha=0.6, extent=(-0.5, w - 0.5, h - 0.5, -0.5)
    )
    if spot:
      axis.plot(spot[1] * w - 0.5, spot[0] * h - 0.5, 'x', color='cyan')
    axis.axis('off')

  return paint


def _line(values: np.ndarray) -> Any:
  def paint(_: Any, axis: Any) -> None:
    axis.plot(np.arange(1, len(values) + 1), values, color='#4477aa')
    axis.set_ylim(bottom=0)
    axis.set_xlabel('set')

  return paint


def _shares(shares: np.ndarray) -> Any:
  def paint(_: Any, axis: Any) -> None:
    bottom = np.zeros(len(shares))
    colours = ('#4477aa', '#ccbb44', '#bbbbbb')
    names = ('prefix', 'text', 'targets')
    layers = np.arange(len(shares))
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
      axis.bar(layers, shares[:, i], bottom=bottom, label=name, color=colour)
      bottom = bottom + shares[:, i]
    axis.set_xticks(layers)
    axis.set_xlabel('layer')
    axis.legend(fontsize=8, loc='lower right')

  return paint
