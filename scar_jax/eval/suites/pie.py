"""Suite 'pie': PIE-Bench, 700 edits of photographs.

In: items of `data.source=pie` and the networks of the scorer. Out: the numbers
of PIE-Bench's tables, whole and for each of its ten edit types. Called by
`scar eval`. Source: method 10.4.
"""

from collections.abc import Mapping
from typing import Any

from scar_jax.eval import published
from scar_jax.eval.generate import Items
from scar_jax.eval.metrics.pie import (
  FACTORS,
  Networks,
  mean_scores,
  score_pair,
  square,
)
from scar_jax.eval.suites import Scored
from scar_jax.eval.tables import Column, Table

COLUMNS = (
  Column('structure', 'structure x10^3', 'down'),
  Column('psnr', 'PSNR dB', 'up'),
  Column('lpips', 'LPIPS x10^3', 'down'),
  Column('mse', 'MSE x10^4', 'down'),
  Column('ssim', 'SSIM x10^2', 'up'),
  Column('clip_whole', 'CLIP whole', 'up'),
  Column('clip_edited', 'CLIP edited', 'up'),
  Column('n', 'n', digits=0),
)


class Pie:
  """Scores by the given networks."""

  fitted = False
  has_truth = False  # the target of a record is its source

  def __init__(self, networks: Networks):
    self._networks = networks

  def score(self, items: Items) -> Scored:
    """See `suites.Suite`."""
    rows, types, lines = [], [], []
    for record, picture in items:
      if record.mask is None:
        raise ValueError(
          f'{record.key} has no mask; accepted: records of data.source=pie'
        )
      mask = record.mask > 0
      row = score_pair(
        record.target,
        square(picture, mask.shape[0]),
        mask,
        record.meta['editing_prompt'],
        self._networks,
      )
      rows.append(row)
      types.append(record.meta['labels']['editing_type'])
      lines.append(
        '\n'.join(f'{k} {v * FACTORS[k]:.2f}' for k, v in row.items())
      )
    by_type = {
      str(kind): {
        'n': types.count(kind),
        **mean_scores(
          [r for r, t in zip(rows, types, strict=True) if t == kind]
        ),
      }
      for kind in sorted(set(types))
    }
    scores = {'n': len(rows), **mean_scores(rows), 'types': by_type}
    return Scored(scores, tuple(lines))

  def tables(
    self, scores: Mapping[str, Mapping[str, Any]], name: str
  ) -> dict[str, Table]:
    """See `suites.Suite`."""
    [found] = scores.values()
    notes = ['Structure sees pixels of 0 to 255, as the official scorer does.']
    if self._networks.missing:
      notes.append(
        f'Not measured, its weights were not given: '
        f'{", ".join(self._networks.missing)}.'
      )
    whole = Table(
      'method',
      COLUMNS,
      {**published.PIE, name: found},
      ours=(name,),
      notes=tuple(notes),
    )
    types = Table('edit type', COLUMNS, found['types'])
    return {'PIE-Bench': whole, 'By edit type': types}
