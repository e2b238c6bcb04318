"""What a model is scored on: one module for each suite of `scar eval`.

In: records and the pictures made of them. Out: numbers, and tables with those
of the paper beside them. A suite loads its networks before anything is made, so
that a missing file is told at once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from scar_jax.eval.generate import Items
from scar_jax.eval.tables import Table

SUITES = ('pie', 'fid', 'controls', 'openmoji', 'scenes')


@dataclasses.dataclass
class Scored:
  """A scored split.

  Attributes:
    scores: measure -> number, or a group of them.
    lines: what the report says of each item; () is nothing.
  """

  scores: dict[str, Any]
  lines: tuple[str, ...] = ()


class Suite(Protocol):
  """What `scar eval` asks of a suite.

  Attributes:
    fitted: records are fitted to the model's size, as in training; else the
      model gets them, and gives them back, as they are.
    has_truth: the target of a record is what the model should have made.
  """

  fitted: bool
  has_truth: bool

  def score(self, items: Items) -> Scored:
    """All numbers of one split."""
    ...

  def tables(
    self, scores: Mapping[str, Mapping[str, Any]], name: str
  ) -> dict[str, Table]:
    """Heading -> table.

    Args:
      scores: split -> what `score` gave.
      name: of the model, for its rows.
    """
    ...


def flat(scores: Mapping[str, Any]) -> dict[str, Any]:
  """The numbers of a split, without groups."""
  return {k: v for k, v in scores.items() if not isinstance(v, Mapping)}
