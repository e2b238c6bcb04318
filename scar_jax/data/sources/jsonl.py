"""A user's own data: one JSONL file, pictures on disk.

In: a JSONL file (or one JSON array) whose records name pictures relative to
its folder, or a folder with `<split>.jsonl`. Out: a `Source`. Each line is
judged on its own; strict mode lists every bad line at once before training.
Where lines lie is kept in an index file, so memory does not grow.

Names accepted for a field: see `data/fields.py`. `seed_edit` and `multigen`
are this source with names and stores of their own.
"""

import dataclasses
import os
import pathlib
import threading
from typing import Any

import numpy as np
from absl import logging

from scar_jax.data import lines, pictures
from scar_jax.data.fields import FIELDS, Fields, checked_label
from scar_jax.data.records import Record, RecordError
from scar_jax.data.stores import Files, Missing, Store, open_store
from scar_jax.data.text import checked_text

_SHOWN = 50  # reasons in one message; the line numbers are all there


@dataclasses.dataclass
class Report:
  """What a check of every line found. Keys are physical line numbers."""

  path: str
  good: list[int] = dataclasses.field(default_factory=list)
  bad: dict[int, str] = dataclasses.field(default_factory=dict)
  warnings: dict[int, str] = dataclasses.field(default_factory=dict)
  blank: int = 0
  duplicates: dict[int, int] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    text = f'{self.path}: {len(self.good)} lines usable, {len(self.bad)} bad'
    if self.bad:
      text += f' (lines {", ".join(map(str, self.bad))})'
      shown = list(self.bad.items())[:_SHOWN]
      text += ''.join(f'\n  line {n}: {reason}' for n, reason in shown)
      more = len(self.bad) - len(shown)
      text += f'\n  and {more} more' if more else ''
    return text


def make(data_cfg: Any, split: str) -> 'Jsonl':
  """The source of a `data` section."""
  return Jsonl(
    find_file(data_cfg.path, split),
    Fields(data_cfg.kind, data_cfg.columns),
    strict=data_cfg.strict,
    store=open_store(data_cfg.images) if data_cfg.images else None,
  )


def find_file(
  path: str | os.PathLike,
  split: str,
  source: str = 'jsonl',
  endings: tuple[str, ...] = ('.jsonl', '.json'),
) -> pathlib.Path:
  """The file of a split: `path` itself, or `path/<split>.jsonl`.

  Raises:
    ValueError: no such file; lists what is there.
  """
  given, path = str(path), pathlib.Path(path)
  if not given:
    raise ValueError(
      f'data.path is empty; data.source={source} needs a file, or a folder'
      f' with <split>{endings[0]} (set --config.data.path)'
    )
  if path.is_dir():
    for ending in endings:
      if (path / f'{split}{ending}').is_file():
        return path / f'{split}{ending}'
    found = sorted(p.name for p in path.iterdir() if p.suffix in endings)
    raise ValueError(
      f'data.path={given!r} has no {split}{endings[0]}; found:'
      f' {", ".join(found) or f"no {endings[0]} file"} (set --config.data.split'
      ' or give the file as --config.data.path)'
    )
  if not path.is_file():
    raise ValueError(f'data.path={given!r} does not exist')
  return path


def check_first(records: lines.Lines, fields: Fields) -> None:
  """Judges the names of the fields by the first record that is an object.

  Raises:
    ValueError: something is missing; shows the names expected and found.
  """
  for i in range(min(len(records), _SHOWN)):
    try:
      first, _ = lines.parse(records.read(i), '')
    except RecordError:
      continue
    where = f'{records.path}, {records.unit} {records.number(i)}'
    fields.check_schema(first, where)
    return


class Jsonl:
  """Records of one JSONL file.

  Args:
    path: the JSONL file.
    fields: names of the fields, and which ones a record must have.
    strict: check every line now.
    store: of the pictures; None is the folder of the file.
    records: the lines; None is all of the file.
    name: of the source, for `describe`.

  Raises:
    ValueError: no lines, or strict and a line is bad.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    fields: Fields,
    strict: bool = False,
    store: dict[str, Store] | Store | None = None,
    records: lines.Lines | None = None,
    name: str = 'jsonl',
  ):
    self.path = pathlib.Path(path)
    self.fields = fields
    self.lines = lines.Lines(self.path) if records is None else records
    self.name = name
    store = Files(self.path.absolute().parent) if store is None else store
    # By role: some data sets keep conditions apart.
    self.stores = (
      store if isinstance(store, dict) else dict.fromkeys(FIELDS, store)
    )
    self._warned: set[int] = set()
    self._lock = threading.Lock()
    if not len(self.lines):
      raise ValueError(f'{self.path} has no lines with content')
    if strict:
      report = self.check()
      for number, reason in report.warnings.items():
        logging.warning('%s:%d: %s', self.path, number, reason)
      if report.bad:
        raise ValueError(str(report))

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_lock'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self.lines)

  def describe(self) -> str:
    kind = self.fields.kind
    return f'{self.name} {self.path}: {len(self)} {self.lines.unit}s, {kind}'

  def check(self, pictures: bool = False) -> Report:
    """Judges every line.

    Args:
      pictures: also decode each picture; otherwise they need only exist.
    """
    report = Report(str(self.path), blank=self.lines.blank)
    first_seen: dict[int, int] = {}
    for i in range(len(self)):
      number = self.lines.number(i)
      try:
        row, warnings = self._row(i)
        if warnings:
          report.warnings[number] = '; '.join(warnings)
        if pictures:
          self.load(i)
      except RecordError as error:
        report.bad[number] = error.reason
        continue
      report.good.append(number)
      same = hash(tuple(sorted((k, repr(v)) for k, v in row.items())))
      if first_seen.setdefault(same, number) != number:
        report.duplicates[number] = first_seen[same]
    return report

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Line `i` of those with content; nothing is random here."""
    del rng
    row, warnings = self._row(i)
    number = self.lines.number(i)
    key = self._key(i)
    if warnings and number not in self._warned:
      with self._lock:
        self._warned.add(number)
      logging.warning('%s: %s', key, '; '.join(warnings))
    target = self._picture('target', row, key)
    condition = mask = None
    if 'condition' in row:
      condition = self._picture('condition', row, key)
    if 'mask' in row:
      name, place = row['mask']
      mask = pictures.mask(self.stores['mask'].read(place), name, key, target)
    return Record(
      target=target,
      condition=condition,
      text=row.get('text', ''),
      label=row.get('label'),
      mask=mask,
      key=key,
      meta={'line': number},
    )

  def size(self, i: int) -> tuple[int, int]:
    """(height, width) of the target of line `i`, from its header."""
    name, place = self._row(i)[0]['target']
    content = self.stores['target'].read(place)
    return pictures.size(content, name, self._key(i))

  def _key(self, i: int) -> str:
    return f'{self.path}:{self.lines.number(i)}'

  def _row(self, i: int) -> tuple[dict[str, Any], list[str]]:
    """Role -> checked value (pictures as found), and warnings."""
    key = self._key(i)
    line, warnings = lines.parse(self.lines.read(i), key)
    matched = self.fields.match(line)
    self.fields.check_record(matched, line, key)
    row: dict[str, Any] = {}
    for role, name in matched.items():
      row[role] = self._field(role, name, line[name], key)
    used = set(matched.values())
    unused = [n for n in line if n not in used and lines.has_nan(line[n])]
    if unused:
      warnings.append(f'NaN in the unused field {", ".join(unused)}')
    return row, warnings

  def _field(self, role: str, name: str, value: Any, key: str) -> Any:
    if role == 'text':
      try:
        return checked_text(value)
      except RecordError as error:
        raise RecordError(key, f'field {name!r}: {error.reason}') from error
    if role == 'label':
      return checked_label(value, name, key)
    try:
      return value, self.stores[role].find(value)
    except Missing as error:
      raise RecordError(key, f'{error} (field {name!r})') from error

  def _picture(self, role: str, row: dict[str, Any], key: str) -> np.ndarray:
    name, place = row[role]
    stretched = role == 'condition' and self.fields.kind == 'depth'
    return pictures.picture(self.stores[role].read(place), name, key, stretched)
