"""What a data source hands to the pipeline: records, and errors about records.

A source is random access and knows nothing of batches, tokens or devices. It
returns whole uint8 pictures; resizing, text encoding and batching are the
pipeline's. A record that cannot be used raises `RecordError`, never returns a
blank picture.
"""

import dataclasses
from collections.abc import Callable, Mapping
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


@runtime_checkable
class Sized(Source, Protocol):
  """A source that tells the sizes of its pictures without decoding them."""

  def size(self, i: int) -> tuple[int, int]:
    """(height, width) of the target of record `i`, as `load` gives it.

    Raises:
      RecordError: its header cannot be read.
    """
    ...


@runtime_checkable
class Rows(Source, Protocol):
  """A source of finished rows of a batch, as `scar tokenize` writes them.

  It has no pictures: `load` is an error that says so.

  Attributes:
    columns: name -> dtype and shape of one row.
  """

  columns: Mapping[str, tuple[np.dtype, tuple[int, ...]]]

  def row(self, i: int, epoch: int) -> dict[str, np.ndarray]:
    """The row of record `i`, as it was drawn for an epoch.

    Raises:
      RecordError: the record could not be used, or the row is damaged.
    """
    ...


def sized(source: Source) -> Sized:
  """The source, which tells the sizes of its pictures.

  Raises:
    ValueError: it does not; names those that do.
  """
  if not isinstance(source, Sized):
    raise ValueError(
      f'data.aspects with {source.describe()}, which does not tell the sizes '
      'of its pictures; accepted: jsonl, imagefolder, parquet, webdataset, '
      'ip2p, seed_edit, multigen, tfds (set --config.data.aspects= for square '
      'crops)'
    )
  return source
