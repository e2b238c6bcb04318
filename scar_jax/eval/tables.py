"""Tables of numbers: Markdown for people who read files, HTML in reports.

In: columns and rows of numbers. Out: text. Called by `scar eval` and
`scar sweep`.
"""

import dataclasses
import html
import math
from collections.abc import Mapping
from typing import Any

_NONE = '–'


@dataclasses.dataclass(frozen=True)
class Column:
  """One measure.

  Attributes:
    key: in the rows.
    title: above the column, with its unit or factor.
    better: 'up', 'down' or ''.
    digits: behind the point.
  """

  key: str
  title: str
  better: str = ''
  digits: int = 2

  @property
  def heading(self) -> str:
    """Title with an arrow to the better side."""
    arrow = {'up': ' ↑', 'down': ' ↓', '': ''}[self.better]
    return f'{self.title}{arrow}'

  def cell(self, value: Any) -> str:
    """A number as text; a pair is a mean with its deviation."""
    if value is None:
      return _NONE
    if isinstance(value, str):
      return value
    if isinstance(value, tuple):
      mean, deviation = (self.cell(v) for v in value)
      return mean if deviation == _NONE else f'{mean} ± {deviation}'
    if not math.isfinite(value):
      return _NONE
    return str(value) if isinstance(value, int) else f'{value:.{self.digits}f}'


@dataclasses.dataclass
class Table:
  """Rows of one set of columns.

  Attributes:
    first: heading of the names.
    columns: see there.
    rows: name -> key -> number; a missing key stays blank.
    ours: names of rows that are set in bold.
    notes: lines below.
  """

  first: str
  columns: tuple[Column, ...]
  rows: Mapping[str, Mapping[str, Any]]
  ours: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  def used(self) -> tuple[Column, ...]:
    """Columns in which some row has a number."""
    return tuple(
      c
      for c in self.columns
      if any(c.cell(row.get(c.key)) != _NONE for row in self.rows.values())
    )

  def markdown(self) -> str:
    """A pipe table, and the notes as a list."""
    columns = self.used()
    lines = [
      f'| {" | ".join([self.first, *(c.heading for c in columns)])} |',
      f'|{"---|" * (len(columns) + 1)}',
    ]
    for name, row in self.rows.items():
      shown = name.replace('|', '\\|')
      shown = f'**{shown}**' if name in self.ours else shown
      cells = [shown, *(c.cell(row.get(c.key)) for c in columns)]
      lines.append(f'| {" | ".join(cells)} |')
    if self.notes:
      lines += ['', *(f'- {note}' for note in self.notes)]
    return '\n'.join(lines) + '\n'

  def html(self) -> str:
    """The same for a page."""
    columns = self.used()

    def line(tag: str, cells: list[str], kind: str = '') -> str:
      inner = ''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)
      return f'<tr{kind}>{inner}</tr>'

    rows = [line('th', [self.first, *(c.heading for c in columns)])]
    for name, row in self.rows.items():
      kind = ' class="ours"' if name in self.ours else ''
      cells = [name, *(c.cell(row.get(c.key)) for c in columns)]
      rows.append(line('td', cells, kind))
    notes = ''.join(f'<p class="note">{html.escape(n)}</p>' for n in self.notes)
    return f'<table>{"".join(rows)}</table>{notes}'
