"""What a data set holds: sizes, lengths, labels, and what cannot be read.

In: a source, a text encoder, which records to look at. Out: a table of
measures and the bad records with their reasons. Called by `scar data inspect`.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from scar_jax.data.badrecords import BadRecord
from scar_jax.data.records import RecordError, Source
from scar_jax.data.text import Text


@dataclasses.dataclass
class Survey:
  """Measures over the records looked at.

  Attributes:
    records: length of the source.
    seen: records looked at.
    bad: those that cannot be used.
    numbers: measure -> one number for each usable record that has it.
    texts: usable records whose text is not empty.
    cut: of them, how many are longer than the encoder takes.
    labels: class id -> records.
  """

  records: int
  seen: int = 0
  bad: list[BadRecord] = dataclasses.field(default_factory=list)
  numbers: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  texts: int = 0
  cut: int = 0
  labels: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  @property
  def unreadable(self) -> float:
    """Share of bad records among those looked at."""
    return len(self.bad) / max(1, self.seen)

  def table(self) -> dict[str, dict[str, float]]:
    """Measure -> lowest, median, mean and highest."""
    return {
      name: {
        'min': float(np.min(values)),
        'median': float(np.median(values)),
        'mean': float(np.mean(values)),
        'max': float(np.max(values)),
      }
      for name, values in self.numbers.items()
    }

  def summary(self) -> dict[str, Any]:
    """Everything as plain data for JSON."""
    good = max(1, self.seen - len(self.bad))
    return {
      'records': self.records,
      'seen': self.seen,
      'unreadable': self.unreadable,
      'empty_text': 1 - self.texts / good,
      'cut_text': self.cut / good,
      'classes': len(self.labels),
      'measures': self.table(),
      'bad': [{'key': b.key, 'reason': b.reason} for b in self.bad],
      'reasons': self.reasons(),
    }

  def reasons(self) -> dict[str, int]:
    """Kinds of reasons, numbers and names left out -> how many."""
    return dict(collections.Counter(_kind(b.reason) for b in self.bad))

  def add(self, name: str, value: float) -> None:
    self.numbers.setdefault(name, []).append(value)


def survey(
  source: Source, text: Text | None = None, chosen: Iterable[int] | None = None
) -> Survey:
  """Looks at records one after another.

  Args:
    source: what is looked at.
    text: encoder, to count tokens; None counts characters only.
    chosen: which records; None is all.
  """
  found = Survey(len(source))
  for i in range(len(source)) if chosen is None else chosen:
    found.seen += 1
    try:
      record = source.load(i, None)
      if text is not None:
        before = text.cut
        _, mask = text.encode(record.text, record.key)
        found.cut += text.cut - before
        found.add('text tokens', int(mask.sum()))
    except RecordError as error:
      found.bad.append(BadRecord(i, i, error.key, error.reason))
      continue
    for name in ('target', 'condition'):
      picture = getattr(record, name)
      if picture is not None:
        height, width = picture.shape[:2]
        found.add(f'{name} height', height)
        found.add(f'{name} width', width)
        found.add(f'{name} width / height', width / height)
    if record.mask is not None:
      found.add('mask share', float(np.mean(record.mask != 0)))
    if record.label is not None:
      found.labels[record.label] += 1
    found.texts += bool(record.text)
    found.add('text characters', len(record.text))
  return found


def spread(count: int, most: int) -> list[int]:
  """At most `most` of `count` places, evenly; 0 is all."""
  if not most or most >= count:
    return list(range(count))
  return [i * count // most for i in range(most)]


def _kind(reason: str) -> str:
  """A reason without what differs from record to record."""
  words = []
  for word in reason.split():
    named = any(c.isdigit() or c in '\'"/\\' for c in word)
    if not named:
      words.append(word)
    elif not words or words[-1] != '...':
      words.append('...')
  return ' '.join(words)[:80]
