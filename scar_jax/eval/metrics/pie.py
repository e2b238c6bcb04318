"""PIE-Bench's numbers of one edit, by its own protocol.

In: the source, the edit, the mask of what may change, the description of the
result. Out: `score_pair`'s numbers, plain; `FACTORS` are those of the tables.
Called by `suites/pie.py`. Source: cure-lab/PnPInversion, method 10.4: masks
multiply by zero, and means are over the whole picture.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from scar_jax.eval.metrics import pixels
from scar_jax.eval.metrics.clip import ClipSimilarity
from scar_jax.eval.metrics.lpips import Lpips
from scar_jax.eval.metrics.structure import Structure

# What tables multiply the numbers by.
FACTORS: Mapping[str, float] = {
  'structure': 1e3,
  'psnr': 1.0,
  'lpips': 1e3,
  'mse': 1e4,
  'ssim': 1e2,
  'clip_whole': 1.0,
  'clip_edited': 1.0,
}
Picture = UInt8[np.ndarray, 'H W 3']


@dataclasses.dataclass
class Networks:
  """What scores need beyond pixels; without one its numbers are left out."""

  structure: Structure | None = None
  lpips: Lpips | None = None
  clip: ClipSimilarity | None = None

  @property
  def missing(self) -> tuple[str, ...]:
    """Measures that cannot be made."""
    needs = {
      'structure': self.structure,
      'lpips': self.lpips,
      'clip_whole': self.clip,
      'clip_edited': self.clip,
    }
    return tuple(name for name, network in needs.items() if network is None)


def square(picture: Picture, side: int) -> Picture:
  """The last `side` columns and rows, as the scorer cuts stitched results."""
  return picture[-side:, -side:]


def score_pair(
  source: Picture,
  edited: Picture,
  mask: Bool[np.ndarray, 'H W'],
  prompt: str,
  networks: Networks | None = None,
) -> dict[str, float]:
  """All numbers of one edit; NaN where nothing is left of the picture.

  Args:
    source: the picture to edit.
    edited: the result, of the same size.
    mask: True where the edit may change pixels.
    prompt: description of the result, without brackets.
    networks: see there.

  Raises:
    ValueError: sizes that differ.
  """
  if not source.shape == edited.shape == (*mask.shape, 3):
    raise ValueError(
      f'source {source.shape}, result {edited.shape}, mask {mask.shape}; '
      'accepted: one size (PIE-Bench: 512x512)'
    )
  networks = networks or Networks()
  kept = (~mask)[..., None]
  a, b = (x.astype(np.float32) / 255 * kept for x in (source, edited))
  scores = {}
  if networks.structure:
    scores['structure'] = networks.structure(source, edited)
  nothing = not kept.any()
  scores['psnr'] = np.nan if nothing else pixels.psnr(a, b)
  if networks.lpips:
    away = nothing or networks.lpips(2 * a - 1, 2 * b - 1)
    scores['lpips'] = np.nan if nothing else float(away)
  scores['mse'] = np.nan if nothing else pixels.mse(a, b)
  scores['ssim'] = np.nan if nothing else pixels.ssim(a, b)
  if networks.clip:
    region = edited * mask[..., None]
    whole, part = networks.clip([edited, region], prompt)
    scores['clip_whole'] = whole
    scores['clip_edited'] = part if mask.any() else np.nan
  return {name: float(scores[name]) for name in FACTORS if name in scores}


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Means over edits, in the units of the tables; NaN rows are skipped."""
  names = [name for name in FACTORS if name in rows[0]]
  means = {}
  for name in names:
    values = np.array([row[name] for row in rows])
    finite = values[np.isfinite(values)]
    means[name] = (
      float(finite.mean() * FACTORS[name]) if len(finite) else (float('nan'))
    )
  return means
