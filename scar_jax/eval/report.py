"""What an evaluation leaves behind: a labelled grid, a JSON file, a table.

In: pictures and numbers. Out: files written whole or not at all, and a table
on the terminal. Called by the command line and the launch scripts.
"""

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _FAINT = (20, 20, 20), (255, 255, 255), (200, 200, 200)
_GAP = 6  # pixels between the cells of a grid
_CELL = 112  # smallest side of a picture's cell, pixels
_TEXT = 150  # width of a column of text, pixels
_FONT = 13  # height of the letters, pixels


def grid(
  columns: Mapping[str, Sequence[UInt8[np.ndarray, 'H W 3'] | str]],
  title: str = '',
  blocks: int = 1,
) -> UInt8[np.ndarray, 'H W 3']:
  """A page of rows under labelled columns.

  Args:
    columns: heading -> one picture or text for each row; all equally long.
      Small pictures are enlarged by a whole factor without smoothing.
    title: a line above all; '' is none.
    blocks: how many times the columns stand side by side; rows fill the first
      block from top to bottom, then the next.

  Raises:
    ValueError: no column, columns of unequal length, or `blocks` below 1.
  """
  lengths = {name: len(cells) for name, cells in columns.items()}
  if not lengths or len(set(lengths.values())) != 1 or blocks < 1:
    raise ValueError(
      f'a grid of columns {lengths} in {blocks} blocks; accepted: columns of '
      'one length, at least one block (eval.report.grid)'
    )
  rows = next(iter(lengths.values()))
  cells = {
    name: [c if isinstance(c, str) else _enlarge(np.asarray(c)) for c in some]
    for name, some in columns.items()
  }
  widths = {name: _width(some) for name, some in cells.items()}
  tall = _CELL // 2
  for some in cells.values():
    tall = max(tall, *(c.shape[0] for c in some if not isinstance(c, str)), 0)
  per_block = max(1, math.ceil(rows / blocks))
  line = _FONT + _GAP
  top = _GAP + line * (2 if title else 1)
  block_width = sum(widths.values()) + _GAP * (len(widths) + 1)
  page = Image.new(
    'RGB',
    (block_width * blocks + _GAP, top + per_block * (tall + _GAP)),
    _PAPER,
  )
  draw, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT)
  if title:
    draw.text((_GAP, _GAP // 2), title, fill=_INK, font=font)
  for block in range(blocks):
    left = block * block_width + _GAP
    for name, some in cells.items():
      draw.text((left, top - line), name, fill=_INK, font=font)
      for i, cell in enumerate(some[block * per_block :][:per_block]):
        y = top + i * (tall + _GAP)
        if isinstance(cell, str):
          text = _wrap(cell, font, widths[name])
          draw.multiline_text((left, y + _GAP), text, fill=_INK, font=font)
        else:
          page.paste(Image.fromarray(cell), (left, y))
          height, width = cell.shape[:2]
          box = (left - 1, y - 1, left + width, y + height)
          draw.rectangle(box, outline=_FAINT)
      left += widths[name] + _GAP
  return np.asarray(page)


def write_grid(
  path: str | os.PathLike,
  columns: Mapping[str, Sequence[UInt8[np.ndarray, 'H W 3'] | str]],
  title: str = '',
  blocks: int = 1,
) -> None:
  """Writes `grid(...)` as a PNG file."""
  picture = Image.fromarray(grid(columns, title, blocks))
  write_atomic(path, lambda file: picture.save(file, format='PNG'))


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON with sorted keys; numbers that are not finite become null."""
  text = json.dumps(_plain(value), indent=2, sort_keys=True, allow_nan=False)
  write_atomic(path, lambda file: file.write(f'{text}\n'.encode()))


def write_atomic(
  path: str | os.PathLike,
  write: Callable[[BinaryIO], Any],
  *,
  alone: bool = False,
) -> None:
  """Calls `write(file)` on a temporary file, then renames it to `path`.

  Args:
    path: where the whole file is to stand.
    write: writes it.
    alone: nobody else writes this path meanwhile. Its temporary file then has
      a name of its own, `.<name>.part`, which the next writer overwrites: a
      process that was killed leaves nothing once the file is made after all.

  Raises:
    OSError: the disk is full or the folder cannot be written; what was at
      `path` is then still there.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle: int | pathlib.Path
  if alone:
    handle = temporary = path.with_name(f'.{path.name}.part')
  else:
    handle, temporary = tempfile.mkstemp(
      dir=path.parent, prefix=f'.{path.name}'
    )
  try:
    with open(handle, 'wb') as file:
      write(file)
    # mkstemp makes files that nobody else may read.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def print_table(
  rows: Mapping[str, Mapping[str, Any]], title: str = '', console: Any = None
) -> None:
  """Prints a table: a line for each entry, a column for each inner key.

  Args:
    rows: name -> measure -> number or text; missing measures stay blank.
    title: above the table.
    console: a `rich.console.Console`; None is the terminal.
  """
  from rich.console import Console
  from rich.table import Table

  names = list(dict.fromkeys(name for row in rows.values() for name in row))
  table = Table(title=title or None)
  table.add_column('', overflow='fold')  # long names on two lines, not cut
  for name in names:
    table.add_column(name.replace('_', ' '), justify='right')
  for label, row in rows.items():
    table.add_row(label, *(_cell(row.get(name)) for name in names))
  (console or Console()).print(table)


def _cell(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, float | np.floating):
    if 0 < abs(value) < 5e-4:
      return f'{value:.1e}'
    return f'{value:.3f}' if abs(value) < 10 else f'{value:.1f}'
  return str(value)


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if hasattr(value, 'tolist'):  # numpy and jax arrays and scalars
    return _plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _enlarge(picture: UInt8[np.ndarray, 'H W 3']) -> np.ndarray:
  factor = max(1, round(_CELL / max(picture.shape[:2])))
  return np.repeat(np.repeat(picture, factor, 0), factor, 1)


def _width(cells: Sequence[np.ndarray | str]) -> int:
  return max(
    [_TEXT if isinstance(c, str) else c.shape[1] for c in cells] or [_TEXT]
  )


def _wrap(text: str, font: Any, width: int) -> str:
  """Breaks between words so that every line fits, long words aside."""
  lines = ['']
  for word in text.split():
    longer = f'{lines[-1]} {word}'.strip()
    if font.getlength(longer) > width and lines[-1]:
      lines.append(word)
    else:
      lines[-1] = longer
  return '\n'.join(lines)
