"""`scar eval`: scores of a trained model on held-out data, and a picture grid.

In: `--workdir` of a run of task 'scar'. Out: a table, and where asked a JSON
file of all numbers and a labelled grid (source, instruction, truth, ours).
"""

import json
import pathlib
import time
from typing import Any

import numpy as np
from absl import flags

from scar_jax.commands import sampling_flags as shared
from scar_jax.commands.parsing import Args

ABOUT = 'Score a trained model on held-out data.'
EXAMPLE = 'scar eval --workdir=runs/edit --json=scores.json --grid=grid.png'
WITH_CONFIG = False


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  shared.define(values)
  for name, about in {
    'json': 'File for all numbers.',
    'grid': 'PNG file for a grid of examples.',
    'splits': 'Of the source, separated by commas; its held-out ones if not '
    'given.',
    'kind': "Kind of records; that of the run's data if not given.",
  }.items():
    flags.DEFINE_string(name, None, about, flag_values=values)
  flags.DEFINE_integer(
    'limit', None, 'Records of each split; 0 is all.', lower_bound=0,
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    'rows', 16, 'Examples in the grid.', lower_bound=1, flag_values=values
  )


def run(args: Args) -> str:
  """Scores; returns the closing line."""
  from scar_jax import config as config_lib
  from scar_jax.artifacts import find_part, load_artifact
  from scar_jax.commands.console import say
  from scar_jax.data.sources import make_source
  from scar_jax.eval import report
  from scar_jax.eval import run as runner

  given = args.flags
  shared.required(given, EXAMPLE, 'workdir')
  workdir = pathlib.Path(given.workdir)
  config = config_lib.check(_config(workdir))
  started = time.monotonic()
  editor = shared.load_editor(given)
  part = load_artifact(
    given.tokenizer or find_part(editor.cfg.tokenizer, workdir), 'tokenizer'
  )
  tokenizer = runner.Reconstructor(part.config, part.params, editor.cfg.batch)
  section: Any = config.eval
  names = tuple((given.splits or '').split(',')) if given.splits else ()
  names = names or section.splits or runner.HELD_OUT.get(config.data.source, ())
  if not names:
    raise ValueError(
      f'data.source={config.data.source!r} has no held-out splits of its own '
      '(set --splits)'
    )
  limit = section.limit if given.limit is None else given.limit
  data: Any = config_lib.replace(config.data, kind=given.kind)
  splits: dict[str, Any] = {}
  for name in names:
    source = make_source(data, name)
    say(f'scoring {name}: {source.describe()}')
    splits[name] = runner.evaluate(
      editor,
      tokenizer,
      source,
      data.source,
      limit,
      given.seed,
      **shared.settings(given),
    )
  scores = {name: split.scores for name, split in splits.items()}
  report.print_table(
    {
      name: {k: v for k, v in s.items() if not isinstance(v, dict)}
      for name, s in scores.items()
    },
    title=str(workdir),
  )
  if given.json:
    written = {
      'splits': scores,
      'source': data.source,
      'kind': data.kind,
      'settings': shared.settings(given),
      'seconds': time.monotonic() - started,
    }
    report.write_json(given.json, written)
  if given.grid:
    report.write_grid(
      given.grid, _columns(splits, given.rows), str(workdir), blocks=2
    )
  places = [p for p in (given.json, given.grid) if p]
  return f'{time.monotonic() - started:.0f} s; {", ".join(places) or "done"}'


def _config(workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / 'config.json'
  try:
    return json.loads(path.read_text())['config']
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
      f'--workdir={str(workdir)!r} is no work directory of a run: '
      f'config.json: {error}'
    ) from error


def _columns(splits: dict[str, Any], rows: int) -> dict[str, list[Any]]:
  """Columns of the grid: examples of each split and kind in turn."""
  columns: dict[str, list[Any]] = {
    name: [] for name in ('source', 'instruction', 'truth', 'ours', 'split')
  }
  for name, split in splits.items():
    kinds: dict[str, list[int]] = {}
    for i, record in enumerate(split.records):
      kinds.setdefault(str(record.meta.get('kind', '')), []).append(i)
    share = max(1, rows // (len(splits) * len(kinds)))
    for kind, members in kinds.items():
      # Spread over the split: neighbours are variants of one drawing.
      picked = np.linspace(0, len(members) - 1, min(share, len(members)))
      for i in (members[int(p)] for p in picked):
        columns['source'].append(split.source[i])
        columns['instruction'].append(split.records[i].text)
        columns['truth'].append(split.truth[i])
        columns['ours'].append(split.result[i])
        columns['split'].append(f'{name} {kind}')
  return columns
