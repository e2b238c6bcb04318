"""Suites 'openmoji' and 'scenes': held-out records of the embedded sources.

In: items whose truth is exact, and the tokenizer. Out: the numbers of
`score_edits` or `score_scenes`, beside what the tokenizer's own reconstruction
of the truth reaches. Called by `scar eval`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scar_jax.eval.generate import Items
from scar_jax.eval.openmoji import masked_psnr, score_edits
from scar_jax.eval.run import Reconstructor
from scar_jax.eval.scenes import score_scenes
from scar_jax.eval.suites import Scored, flat
from scar_jax.eval.tables import Column, Table

_SHARES = ('exact', 'changed_exact', 'kept_exact', 'tone_accuracy')
_DECIBELS = ('background_psnr', 'psnr')
_CEILING = 'tokenizer_'


class Embedded:
  """Scores by the rules of one embedded source.

  Args:
    name: of the source.
    tokenizer: the ceiling.
  """

  fitted = True
  has_truth = True

  def __init__(self, name: str, tokenizer: Reconstructor):
    self._name, self._tokenizer = name, tokenizer

  def score(self, items: Items) -> Scored:
    """See `suites.Suite`; the whole split is held in memory."""
    pairs = list(items)
    records = [record for record, _ in pairs]
    result = np.stack([picture for _, picture in pairs])
    truth = np.stack([r.target for r in records])
    again = self._tokenizer(truth)
    whole = np.ones(truth.shape[:3], bool)
    psnr = masked_psnr(result, truth, whole)
    ceiling = masked_psnr(again, truth, whole)
    scores: dict[str, Any] = {'n': len(records)}
    if self._name == 'scenes' and all('kind' in r.meta for r in records):
      scores |= score_scenes(result, records, again)
    elif self._name == 'openmoji':
      tone = np.array([r.meta.get('tone', -1) for r in records])
      if (tone >= 0).any():
        blank = np.full_like(truth[0], 255)
        source = np.stack(
          [blank if r.condition is None else r.condition for r in records]
        )
        scores |= score_edits(result, source, truth, tone, again)
      rows = np.array([r.meta.get('kind') == 'control' for r in records])
      if rows.any():
        scores['control'] = {
          'n': int(rows.sum()),
          'psnr': float(psnr[rows].mean()),
          'tokenizer_psnr': float(ceiling[rows].mean()),
        }
    scores['psnr'] = float(psnr.mean())
    scores['tokenizer_psnr'] = float(ceiling.mean())
    return Scored(scores, tuple(f'PSNR {value:.1f} dB' for value in psnr))

  def tables(
    self, scores: Mapping[str, Mapping[str, Any]], name: str
  ) -> dict[str, Table]:
    """See `suites.Suite`: ours above the tokenizer's, for each split."""
    columns = (
      Column('n', 'n', digits=0),
      *(Column(k, k.replace('_', ' '), 'up', 3) for k in _SHARES),
      *(
        Column(k, f'{k.replace("_", " ").replace("psnr", "PSNR")} dB', 'up')
        for k in _DECIBELS
      ),
    )
    tables = {}
    for split, found in scores.items():
      numbers = flat(found)
      ceiling = {
        k.removeprefix(_CEILING): v
        for k, v in numbers.items()
        if k.startswith(_CEILING)
      }
      tables[split] = Table(
        'model',
        columns,
        {name: numbers, 'tokenizer (the ceiling)': ceiling},
        ours=(name,),
      )
    return tables
