"""Several sources as one, each with its share of the stream.

In: sources and weights. Out: a `Source` in which their records lie one after
another; `order.mixed_at` says which comes at which place of training, so that
a resume, another number of hosts or workers, or another batch size reads the
same stream. Evaluation reads every record of every part once.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from scar_jax.data.order import MIX_BLOCK, shares_of
from scar_jax.data.records import Record, RecordError, Rows, Source

_PROBED = 64


class Mixture:
  """Records of several sources.

  Args:
    parts: the sources.
    weights: of each; only their ratios count.

  Attributes:
    counts: records of each part.
    shares: places of each part among `order.MIX_BLOCK`.

  Raises:
    ValueError: a part without records, parts whose records have other fields,
      or a weight that is not positive.
  """

  def __init__(self, parts: Sequence[Source], weights: Sequence[float]):
    self.parts = tuple(parts)
    self.counts = tuple(len(part) for part in parts)
    self.shares = shares_of(weights)
    self._ends = np.cumsum(self.counts).tolist()
    found = [_fields(part) for part in parts]
    for part, fields in zip(parts, found, strict=True):
      if fields != found[0]:
        raise ValueError(
          f'data.mixture: {part.describe()} has {", ".join(fields)};'
          f' {parts[0].describe()} has {", ".join(found[0])}; accepted: parts'
          ' with the same fields'
        )

  def __len__(self) -> int:
    return self._ends[-1]

  def describe(self) -> str:
    listed = [
      f'{100 * share / MIX_BLOCK:.1f} % {part.describe()}'
      for part, share in zip(self.parts, self.shares, strict=True)
    ]
    return f'mixture of {"; ".join(listed)}'

  def load(self, i: int, rng: np.random.Generator | None) -> Record:
    """Record `i` of all, in the order of the parts."""
    part, inside = self.place_of(i)
    return self.parts[part].load(inside, rng)

  def place_of(self, i: int) -> tuple[int, int]:
    """The part that holds record `i` of all, and its number there."""
    part = bisect.bisect_right(self._ends, i)
    return part, i - self._ends[part] + self.counts[part]


def _fields(source: Source) -> tuple[str, ...]:
  """What the records of a source have, from the first that loads."""
  if isinstance(source, Rows):
    return tuple(
      f'{name} {dtype}{list(shape)}'
      for name, (dtype, shape) in source.columns.items()
    )
  errors = []
  for i in range(min(len(source), _PROBED)):
    try:
      record = source.load(i, None)
    except RecordError as error:
      errors.append(str(error))
      continue
    names = ('condition', 'label')
    return 'target', *(n for n in names if getattr(record, n) is not None)
  reasons = '\n  '.join(errors[:10]) or 'it has no records'
  raise ValueError(f'{source.describe()}: nothing can be used:\n  {reasons}')
