"""What a data source hands to the pipeline: records, and errors about records.

A source is random access and knows nothing of batches, tokens or devices. It
returns whole uint8 pictures; resizing, text encoding and batching are the
pipeline's. A record that cannot be used raises `RecordError`, never returns a
blank picture.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8


class RecordError(ValueError):
  """One record cannot be used; the run may skip it and count it.

  Attributes:
    key: which record (file, line, row): what a user searches for.
    reason: what was found and what was wanted.
  """

  def __init__(self, key: str, reason: str):
    super().__init__(f'{key}: {reason}')
    self.key = key
    self.reason = reason

  def __reduce__(self):
    # The default would pickle the joined message and lose the two parts.
    return RecordError, (self.key, self.reason)


@dataclasses.dataclass
class Record:
  """One example, before it becomes a row of a `types.Batch`.

  Attributes:
    target: picture to produce, uint8 RGB.
    condition: source picture or control map, uint8 RGB, or None.
    text: instruction or caption; '' is the null condition.
    label: class id, or None.
    mask: where the edit may change pixels (nonzero), or None. For scoring.
    key: stable name of the record, for reports.
    meta: facts for scoring. `meta['labels']` (name -> int) become int32 batch
      keys `label_<name>`; the rest does not reach a batch.
    draw: makes the condition of the target as it is trained on, after its crop;
      then `condition` is None.
  """

  target: UInt8[np.ndarray, 'H W 3']
  condition: UInt8[np.ndarray, 'H W 3'] | None = None
  text: str = ''
  label: int | None = None
  mask: UInt8[np.ndarray, 'H W'] | None = None
  key: str = ''
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)
  draw: Callable[[np.ndarray], np.ndarray] | None = None


@runtime_checkable
class Source(Protocol):
  """Random access to records; picklable, and safe to share by threads."""

  def __len__(self) -> int:
    """Number of records, the bad ones included."""
    ...

  def load(self, i: int, rng: np.random.Generator | None) -> Record:
    """Record `i`.

    Args:
      i: 0 <= i < len(self).
      rng: the only randomness of augmentation; None is deterministic.

    Raises:
      RecordError: the record cannot be used.
    """
    ...

  def describe(self) -> str:
    """One line for the log: what, how many, from where."""
    ...
