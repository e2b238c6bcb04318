"""A user's own data: one JSONL file, pictures on disk.

In: a JSONL file whose lines name pictures relative to its folder, or a folder
with `<split>.jsonl`. Out: a `Source`. Each line is judged on its own; strict
mode lists every bad line at once before training. Only the byte offset and the
number of each line are kept in memory.

Names accepted for a field, the first found is used: see `FIELDS`.
"""

import dataclasses
import os
import pathlib
import threading
from typing import Any

import numpy as np
from absl import logging

from scar_jax.data.controls import depth
from scar_jax.data.records import Record, RecordError
from scar_jax.data.sources import jsonl
from scar_jax.data.text import checked_text
from scar_jax.data.transforms import decode

FIELDS = {
  'target': ('target', 'target_image', 'edited_image', 'output', 'image'),
  'condition': (
    *('source', 'source_image', 'original_image', 'input'),
    *('control', 'control_image', 'condition'),
  ),
  'text': ('instruction', 'edit_prompt', 'prompt', 'caption', 'text'),
  'label': ('label', 'class'),
  'mask': ('mask', 'mask_image'),
}
# What each kind of record must have.
KINDS = {
  'edit': ('target', 'condition', 'text'),
  'control': ('target', 'condition'),
  'depth': ('target', 'condition'),  # control, stretched by min and max
  'image': ('target',),
}
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


def make(data_cfg: Any, split: str) -> 'Folder':
  """The source of a `data` section."""
  return Folder(
    find_file(data_cfg.path, split),
    kind=getattr(data_cfg, 'kind', 'edit'),
    strict=getattr(data_cfg, 'strict', False),
  )


def find_file(path: str | os.PathLike, split: str) -> pathlib.Path:
  """The JSONL file of a split: `path` itself, or `path/<split>.jsonl`."""
  given, path = str(path), pathlib.Path(path)
  if not given:
    raise ValueError(
      'data.path is empty; data.source=folder needs a JSONL file, or a folder'
      ' with <split>.jsonl (set --config.data.path)'
    )
  if path.is_dir():
    found = sorted(p.name for p in path.glob('*.jsonl'))
    if f'{split}.jsonl' not in found:
      raise ValueError(
        f'data.path={given!r} has no {split}.jsonl; found:'
        f' {", ".join(found) or "no .jsonl file"}'
      )
    return path / f'{split}.jsonl'
  if not path.is_file():
    raise ValueError(f'data.path={given!r} does not exist')
  return path


class Folder:
  """Records of one JSONL file.

  Args:
    path: the JSONL file; pictures are relative to its folder and inside it.
    kind: what a line must have, see `KINDS`.
    strict: check every line now.

  Raises:
    ValueError: no lines, an unknown kind, or strict and a line is bad.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    kind: str = 'edit',
    strict: bool = False,
  ):
    if kind not in KINDS:
      raise ValueError(f'data.kind={kind!r}; accepted: {", ".join(KINDS)}')
    self.path = pathlib.Path(path)
    self.root = self.path.absolute().parent
    self.kind = kind
    self.lines = jsonl.Lines(self.path)
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
    return f'folder {self.path}: {len(self)} lines, kind {self.kind}'

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
    target = self._picture(row['target'], key)
    condition = mask = None
    if 'condition' in row:
      condition = self._picture(row['condition'], key, self.kind == 'depth')
    if 'mask' in row:
      mask = self._picture(row['mask'], key)[..., 0]
    return Record(
      target=target,
      condition=condition,
      text=row.get('text', ''),
      label=row.get('label'),
      mask=mask,
      key=key,
      meta={'line': number},
    )

  def _key(self, i: int) -> str:
    return f'{self.path}:{self.lines.number(i)}'

  def _row(self, i: int) -> tuple[dict[str, Any], list[str]]:
    """Role -> checked value (pictures as paths that exist), and warnings."""
    key = self._key(i)
    line, warnings = jsonl.parse(self.lines.read(i), key)
    row: dict[str, Any] = {}
    used = set()
    for role, names in FIELDS.items():
      name = next((n for n in names if n in line), None)
      if name is not None:
        used.add(name)
        row[role] = self._field(role, name, line[name], key)
      elif role in KINDS[self.kind]:
        wanted = 'instruction' if role == 'text' else role
        raise RecordError(
          key,
          f'no {wanted}; accepted names: {", ".join(names)}; found:'
          f' {", ".join(map(repr, line)) or "nothing"}',
        )
    unused = [n for n in line if n not in used and jsonl.has_nan(line[n])]
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
      if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
      raise RecordError(
        key, f'field {name!r} is {value!r}; accepted: a whole number >= 0'
      )
    return self._path(name, value, key)

  def _path(self, name: str, value: Any, key: str) -> pathlib.Path:
    if not isinstance(value, str) or not value.strip():
      raise RecordError(
        key,
        f'field {name!r} must be the path of a picture, found'
        f' {type(value).__name__} {value!r:.60}',
      )
    if '://' in value:
      raise RecordError(
        key, f'field {name!r} is an address, {value!r:.120}; download it first'
      )
    path = pathlib.Path(os.path.normpath(self.root / value))
    if not path.is_relative_to(self.root):
      raise RecordError(
        key, f'field {name!r}: {value!r} lies outside the data folder'
      )
    try:
      if path.is_file():
        return path
    except ValueError:  # a NUL in the name
      pass
    hint = ' (use / between folders)' if '\\' in value else ''
    raise RecordError(key, f'missing file {value!r} in field {name!r}{hint}')

  def _picture(
    self, path: pathlib.Path, key: str, stretched: bool = False
  ) -> np.ndarray:
    name = os.path.relpath(path, self.root)
    try:
      return depth(path, 'minmax', name) if stretched else decode(path, name)
    except RecordError as error:
      raise RecordError(key, f'{error.key}: {error.reason}') from error
