"""Bad records: counted, listed with reasons, and a limit on their share.

In: the bad records of each batch. Out: a report file with one JSON line per
record, a log line at the end of each epoch, and an error when strict or when
too many rows are bad.
"""

import json
import os
import pathlib
from typing import NamedTuple

from absl import logging

from scar_jax.data.records import RecordError

# The share is judged over at least so many rows (or the whole source), so one
# bad record in the first batch does not stop a long run.
_LEAST_ROWS = 100
_SHOWN = 20


class BadRecord(NamedTuple):
  """Place in the stream, index in the source, name, and what is wrong."""

  place: int
  index: int
  key: str
  reason: str

  def __str__(self) -> str:
    return f'{self.key}: {self.reason}'


class BadRecords:
  """All bad records of one loader.

  Args:
    records: length of the source.
    strict: the first bad record is an error.
    max_share: of bad rows among those seen, above which it is an error.
    path: report file, appended to; None writes nothing.
  """

  def __init__(
    self,
    records: int,
    strict: bool,
    max_share: float,
    path: pathlib.Path | None,
  ):
    self.records = records
    self.strict = strict
    self.max_share = max_share
    self.path = path
    self.rows = 0
    self.count = 0
    self.found: dict[int, BadRecord] = {}
    self._written = self._read() if path else set()
    self._epoch = 0
    self._listed_count = 0

  def add(self, bad: list[BadRecord], rows: int) -> None:
    """Counts one batch of `rows` real rows.

    Raises:
      RecordError: strict, and `bad` is not empty.
      ValueError: the share is above the limit; lists the records.
    """
    self.rows += rows
    if not bad:
      return
    self.count += len(bad)
    self.found |= {b.index: b for b in bad}
    self._write(bad)
    if self.strict:
      raise RecordError(bad[0].key, bad[0].reason)
    base = max(self.rows, min(self.records, _LEAST_ROWS))
    if self.count > self.max_share * base:
      raise ValueError(
        f'{self.count} of {self.rows} records read cannot be used, more than'
        f' data.max_bad_share={self.max_share} allows'
        f'{self._listed()}'
      )

  def report_epoch(self, epoch: int) -> None:
    """Logs what was skipped, once per epoch."""
    if epoch > self._epoch and self.found:
      # The list only when it has grown: an epoch may take a second.
      logging.warning(
        'epoch %d: %d of %d records skipped%s',
        epoch,
        len(self.found),
        self.records,
        self._listed() if len(self.found) > self._listed_count else '',
      )
      self._listed_count = len(self.found)
    self._epoch = max(epoch, self._epoch)

  def _listed(self) -> str:
    lines = [f'\n  {b}' for b in list(self.found.values())[:_SHOWN]]
    more = len(self.found) - len(lines)
    if more:
      lines.append(f'\n  and {more} more')
    if self.path:
      lines.append(f'\n  all of them: {self.path}')
    return ''.join(lines)

  def _read(self) -> set[str]:
    """Keys and reasons already in the report of this work directory."""
    written = set()
    if self.path and self.path.exists():
      for line in self.path.read_text().splitlines():
        try:
          row = json.loads(line)
          written.add(f'{row["key"]}: {row["reason"]}')
        except (ValueError, KeyError, TypeError):
          continue  # cut by a kill while writing
    return written

  def _write(self, bad: list[BadRecord]) -> None:
    fresh = [b for b in bad if str(b) not in self._written]
    if not self.path or not fresh:
      return
    self._written |= {str(b) for b in fresh}
    self.path.parent.mkdir(parents=True, exist_ok=True)
    lines = ''.join(json.dumps(b._asdict()) + '\n' for b in fresh)
    # One write call, so a kill can cut at most the last line.
    with open(self.path, 'ab', buffering=0) as file:
      file.write(lines.encode())
      os.fsync(file.fileno())
