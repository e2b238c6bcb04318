"""A report as one HTML file, pictures included: it opens without a server.

In: tables, facts, and columns of pictures and texts. Out: the text of a page.
Called by `scar eval`.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from scar_jax.eval.tables import Table

_SHOWN = 192  # pixels of a picture on the page, at most
_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top }
tr.ours td { font-weight: 600; background: #f4f7ee }
img { image-rendering: pixelated; border: 1px solid #ccc; display: block;
  width: 12em; height: auto }
.note, .facts { color: #666; max-width: 60em }
td.text { max-width: 16em; white-space: pre-line }
"""


def page(
  title: str,
  tables: Mapping[str, Table],
  columns: Mapping[str, Sequence[UInt8[np.ndarray, 'H W 3'] | str]],
  facts: Mapping[str, Any] | None = None,
) -> str:
  """The whole page.

  Args:
    title: of the page.
    tables: heading -> table.
    columns: heading -> one picture or text for each example.
    facts: name -> value, in small print: model, seed, settings.
  """
  parts = [f'<h1>{html.escape(title)}</h1>']
  if facts:
    told = '; '.join(f'{k}: {v}' for k, v in facts.items())
    parts.append(f'<p class="facts">{html.escape(told)}</p>')
  for heading, table in tables.items():
    parts.append(f'<h2>{html.escape(heading)}</h2>{table.html()}')
  if columns:
    parts.append(f'<h2>Examples</h2>{_examples(columns)}')
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    f'<title>{html.escape(title)}</title><style>{_STYLE}</style>'
    f'<body>{"".join(parts)}</body></html>\n'
  )


def difference(
  a: UInt8[np.ndarray, 'H W 3'], b: UInt8[np.ndarray, 'H W 3']
) -> UInt8[np.ndarray, 'H W 3']:
  """Where two pictures differ: absolute differences, white is equal."""
  gap = np.abs(a.astype(np.int16) - b.astype(np.int16))
  return (255 - gap).astype(np.uint8)


def _examples(columns: Mapping[str, Sequence[Any]]) -> str:
  heads = ''.join(f'<th>{html.escape(name)}</th>' for name in columns)
  rows = [f'<tr>{heads}</tr>']
  for cells in zip(*columns.values(), strict=True):
    shown = [
      f'<td class="text">{html.escape(c)}</td>'
      if isinstance(c, str)
      else f'<td><img alt="" src="{_inline(c)}"></td>'
      for c in cells
    ]
    rows.append(f'<tr>{"".join(shown)}</tr>')
  return f'<table>{"".join(rows)}</table>'


def _inline(picture: np.ndarray) -> str:
  """A picture as a data address, made smaller if it is large."""
  image = Image.fromarray(picture)
  image.thumbnail((2 * _SHOWN, 2 * _SHOWN))
  buffer = io.BytesIO()
  image.save(buffer, format='PNG')
  return f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'
