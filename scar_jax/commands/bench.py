"""`scar bench`: how fast this machine is.

In: the name of a bench, such as `orders`, and sizes. Out: a table, and where
asked a JSON or Markdown file of the same rows. One module of `scar_jax/bench/`
for each.
"""

import importlib
from typing import Any

from absl import flags

from scar_jax.commands.parsing import Args
from scar_jax.config_values import nearest

ABOUT = 'Measure speed on this machine.'
EXAMPLE = 'scar bench orders --json=orders.json'
WITH_CONFIG = False
POSITIONAL = 'name'
# Name -> what it measures; the module is scar_jax/bench/<name>.py.
BENCHES = {
  'orders': 'steps and seconds per image of each order',
  'data': 'images per second of the input pipeline and of PyTorch',
  'manifests': 'time and memory to open a million records',
  'trained': 'accuracy and seconds per image of trained models',
  'reference': 'seconds beside the PyTorch code of LlamaGen, VAR and DINOv2',
}


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  from scar_jax.bench.theirs.common import CHECKOUTS

  known = '; '.join(f'{name}: {about}' for name, about in BENCHES.items())
  flags.DEFINE_string('name', None, f'Of {known}.', flag_values=values)
  flags.DEFINE_string('json', None, 'File for the rows.', flag_values=values)
  flags.DEFINE_string(
    'markdown', None, 'File for the table.', flag_values=values
  )
  flags.DEFINE_string(
    'size', 'small', 'Of the decoder, such as small, B or L.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_enum(
    'dtype', 'float32', ('float32', 'bfloat16'), 'Of matrix products.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_list(
    'workdirs', [], 'Of trained: OUT directories of quickstarts, with commas.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_list(
    'sets', ['8', '16', '32'], 'Steps of the random order, one row for each.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_list(
    'counts', ['1000', '100000', '1000000'], 'Records of manifests.',
    flag_values=values,
  )  # fmt: skip
  for name, about in CHECKOUTS.items():
    flags.DEFINE_string(
      name, '', f'Of reference: checkout of {about}.', flag_values=values
    )
  flags.DEFINE_list(
    'work', [], 'Of reference: what to measure, such as llamagen-b/sample; all '
    'works of the checkouts if not given.', flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    'threads', None, 'Of reference: cores of both sides; all if not given.',
    lower_bound=1, flag_values=values,
  )  # fmt: skip
  flags.DEFINE_boolean(
    'compile', False, 'Of reference: also with torch.compile.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_boolean(
    'dropout', False, 'Of reference: train with the dropouts of the recipes; '
    'outputs are then not compared.', flag_values=values,
  )  # fmt: skip
  flags.DEFINE_float(
    'guidance', 3.0, 'Strength of the text; 1 makes no null branch.',
    flag_values=values,
  )  # fmt: skip
  for name, (default, about) in {
    'grid': (16, 'Tokens per side.'),
    'batch': (1, 'Images made together.'),
    'repeats': (
      5,
      'Timed calls, of which the median counts; of reference turns of two '
      'calls, of which the best counts.',
    ),
    'workers': (1, 'Loader processes of data.'),
    'records': (400, 'Pictures of data.'),
    'side': (512, 'Pixels of data.'),
  }.items():
    flags.DEFINE_integer(
      name, default, about, lower_bound=1, flag_values=values
    )


def run(args: Args) -> str:
  """Measures; returns the closing line.

  Raises:
    ValueError: no such bench, or sizes that it cannot take.
  """
  from scar_jax.commands.console import say
  from scar_jax.eval.report import print_table, write_atomic, write_json

  given = args.flags
  if given.name not in BENCHES:
    raise ValueError(
      f'bench {given.name!r} is unknown.{nearest(given.name or "", BENCHES)} '
      f'Known: {", ".join(BENCHES)}. Example: {EXAMPLE}'
    )
  bench: Any = importlib.import_module(f'scar_jax.bench.{given.name}')
  say(f'measuring {BENCHES[given.name]}')
  report = bench.run(given)
  shown = ', '.join(f'{k} {v}' for k, v in report.settings.items())
  rows = report.table()
  print_table(rows, title=shown)
  if given.markdown:
    text = _markdown(rows, shown).encode()
    write_atomic(given.markdown, lambda file: file.write(text))
  if given.json:
    write_json(
      given.json,
      {'bench': given.name, 'settings': report.settings, 'rows': report.rows},
    )
  return str(given.json or given.markdown or 'done')


def _markdown(rows: dict[str, dict[str, Any]], note: str) -> str:
  """A pipe table; differences are as small as times are large."""
  from scar_jax.eval.tables import Column, Table

  names = dict.fromkeys(name for row in rows.values() for name in row)
  columns = tuple(Column(name, name.replace('_', ' ')) for name in names)
  short = {
    label: {
      k: f'{v:.3g}' if isinstance(v, float) else v for k, v in row.items()
    }
    for label, row in rows.items()
  }
  return Table('', columns, short, notes=(note,)).markdown()
