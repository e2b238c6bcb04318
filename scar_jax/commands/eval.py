"""`scar eval`: scores of a trained model, beside those of the paper.

In: `--workdir` of a run of task 'scar', a suite, and the files of its networks.
Out: tables on the terminal; with `--out` a folder with every picture,
`scores.json`, `table.md` and `report.html`; where asked a JSON file of all
numbers and a labelled grid (source, instruction, truth, ours).
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags

from scar_jax.commands import sampling_flags as shared
from scar_jax.commands import suite_flags
from scar_jax.commands.parsing import Args, lay_over, load_config

ABOUT = 'Score a trained model, and write tables and a page of pictures.'
EXAMPLE = (
  'scar eval --workdir=runs/edit --suite=pie --config.data.path=PIE '
  '--dino=artifacts/dino --out=runs/edit/pie'
)
WITH_CONFIG = True


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  shared.define(values)
  suite_flags.define(values)
  for name, about in {
    'config': "Config file whose data is scored on; the run's own if not "
    'given.',
    'out': 'Folder for pictures and reports; what is there is not made again.',
    'share': 'K/N makes the pictures K, K + N, ... from 0 on, and scores '
    'nothing: N processes fill one --out, then a call without it scores.',
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
    'rows', 16, 'Examples in the grid and on the page.', lower_bound=1,
    flag_values=values,
  )  # fmt: skip


def run(args: Args) -> str:
  """Scores; returns the closing line."""
  from scar_jax.artifacts import read_description
  from scar_jax.commands.console import say
  from scar_jax.data.sources import make_source
  from scar_jax.eval import generate as making

  given, started = args.flags, time.monotonic()
  if given.predicted or given.labels:
    scores, tables = suite_flags.score_segments(given)
    return _write(given, {'segments': scores}, tables, {}, {}, started)
  shared.required(given, EXAMPLE, 'workdir')
  workdir = pathlib.Path(given.workdir)
  config = _config(given, args.overrides, workdir)
  name = suite_flags.suite_name(given, config.data)
  data = suite_flags.suite_data(name, config.data)
  share = read_share(given.share)
  if given.share and not given.out:
    raise ValueError('--share without --out; accepted: both')
  splits = _splits(name, given, config)
  limit = config.eval.limit if given.limit is None else given.limit
  editor = shared.load_editor(given)
  if name in ('openmoji', 'scenes'):
    suite = _embedded(name, given, editor, workdir)
  else:
    suite = suite_flags.make_suite(name, given, config)
  used = {
    **shared.settings(given),
    'seed': given.seed,
    'model': read_description(workdir)['fingerprint'],
    'source': data.source,
    'kind': data.kind,
  }
  if given.out:
    shared.same_settings(pathlib.Path(given.out), used)
  size = (editor.cfg.image_size,) * 2
  fit = dict(size=size, how=data.fit, ratio=data.crop_ratio)
  scored, items = {}, {}
  for split in splits:
    source = make_source(data, split)
    say(f'{name}, {split}: {source.describe()}')
    folder = pathlib.Path(given.out) / split if given.out else None
    items[split] = making.generate(
      editor,
      source,
      making.Pictures(folder),
      limit=limit,
      fit=fit if suite.fitted else None,
      share=share,
      seed=given.seed,
      settings=shared.settings(given),
    )
    if not given.share:
      scored[split] = suite.score(items[split])
  if given.share:
    made = sum(len(some) for some in items.values())
    return f'{made} pictures of share {given.share} in {given.out}, not scored'
  scores = {split: found.scores for split, found in scored.items()}
  examples = _examples(suite, items, scored, given.rows)
  tables = suite.tables(scores, str(workdir))
  return _write(given, scores, tables, examples, used, started)


def read_share(text: str | None) -> tuple[int, int]:
  """(K, N) of 'K/N'; all of it for None.

  Raises:
    ValueError: not two numbers with 0 <= K < N.
  """
  first, slash, every = (text or '0/1').partition('/')
  if not (slash and first.isdecimal() and every.isdecimal()) or not (
    int(first) < int(every)
  ):
    raise ValueError(
      f'--share={text!r}; accepted: K/N with K from 0 to N - 1, such as 0/8'
    )
  return int(first), int(every)


def _config(
  given: flags.FlagValues, overrides: Mapping[str, str], workdir: pathlib.Path
) -> Any:
  """The checked config of the run, or of --config, with overrides."""
  from scar_jax import config as config_lib

  overrides = dict(overrides)
  if given.kind is not None:
    overrides['data.kind'] = given.kind
  if given.config:
    config = config_lib.check(load_config(given.config, overrides))
    return _behind_cache(config)
  path = workdir / 'config.json'
  try:
    raw = json.loads(path.read_text())['config']
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
      f'--workdir={str(workdir)!r} is no work directory of a run: '
      f'config.json: {error}; accepted: one, or --config for the data'
    ) from error
  lay_over(raw, overrides)
  return _behind_cache(config_lib.check(raw))


def _behind_cache(config: Any) -> Any:
  """The config with the data that a cache was made from, to score on."""
  from scar_jax.data import manifest

  return dataclasses.replace(config, data=manifest.made_from(config.data))


def _splits(name: str, given: flags.FlagValues, config: Any) -> tuple[str, ...]:
  from scar_jax.eval.run import HELD_OUT

  if given.splits:
    return tuple(given.splits.split(','))
  if name == 'pie':
    return ('all',)
  found = config.eval.splits or HELD_OUT.get(config.data.source, ())
  if not found:
    raise ValueError(
      f'data.source={config.data.source!r} has no held-out splits of its own '
      '(set --splits)'
    )
  return found


def _embedded(
  name: str, given: flags.FlagValues, editor: Any, workdir: pathlib.Path
) -> Any:
  from scar_jax.artifacts import find_part, load_artifact
  from scar_jax.eval.run import Reconstructor
  from scar_jax.eval.suites.embedded import Embedded

  part = load_artifact(
    given.tokenizer or find_part(editor.cfg.tokenizer, workdir), 'tokenizer'
  )
  tokenizer = Reconstructor(part.config, part.params, editor.cfg.batch)
  return Embedded(name, tokenizer)


def _write(
  given: flags.FlagValues,
  scores: Mapping[str, Any],
  tables: Mapping[str, Any],
  examples: dict[str, list[Any]],
  used: dict[str, Any],
  started: float,
) -> str:
  """Writes what was asked for; returns the closing line."""
  from scar_jax.eval import html, report
  from scar_jax.eval.suites import flat

  name = str(given.workdir or given.predicted)
  shown = {split: flat(found) for split, found in scores.items()}
  report.print_table(shown, title=name)
  written = {
    'splits': scores,
    **{k: used[k] for k in ('source', 'kind') if k in used},
    'settings': shared.settings(given),
    'seconds': time.monotonic() - started,
  }
  places = []
  if given.json:
    report.write_json(given.json, written)
    places.append(given.json)
  if given.grid and examples:
    columns = {k: v for k, v in examples.items() if k in _GRID}
    report.write_grid(given.grid, columns, name, blocks=2)
    places.append(given.grid)
  if given.out:
    out = pathlib.Path(given.out)
    report.write_json(out / 'scores.json', written)
    texts = {
      'table.md': '\n'.join(
        f'## {heading}\n\n{table.markdown()}'
        for heading, table in tables.items()
      ),
      'report.html': html.page(f'scar eval: {name}', tables, examples, used),
    }
    for file_name, text in texts.items():
      report.write_atomic(
        out / file_name, lambda file, text=text: file.write(text.encode())
      )
    places.append(str(out / 'report.html'))
  return f'{time.monotonic() - started:.0f} s; {", ".join(places) or "done"}'


_GRID = ('source', 'instruction', 'truth', 'ours', 'split')


def _examples(
  suite: Any, items: Mapping[str, Any], scored: Mapping[str, Any], rows: int
) -> dict[str, list[Any]]:
  """Columns of grid and page: examples of each split and kind in turn."""
  from scar_jax.eval.html import difference

  columns: dict[str, list[Any]] = {
    name: [] for name in (*_GRID[:4], 'difference', 'scores', 'split')
  }
  for split, some in items.items():
    records = [some.record(at) for at in range(min(len(some), 64 * rows))]
    kinds: dict[str, list[int]] = {}
    for at, record in enumerate(records):
      kinds.setdefault(str(record.meta.get('kind', '')), []).append(at)
    share = max(1, rows // (len(items) * len(kinds)))
    for kind, members in kinds.items():
      # Spread over the split: neighbours are variants of one drawing.
      picked = np.linspace(0, len(members) - 1, min(share, len(members)))
      for at in (members[int(p)] for p in picked):
        record, picture = records[at], some.picture(at)
        blank = np.full_like(record.target, 255)
        source = blank if record.condition is None else record.condition
        lines = scored[split].lines
        columns['source'].append(source)
        columns['instruction'].append(record.text)
        columns['truth'].append(record.target)
        columns['ours'].append(picture)
        columns['difference'].append(difference(record.target, picture))
        columns['scores'].append(lines[at] if lines else '')
        columns['split'].append(f'{split} {kind}')
  if not suite.has_truth:
    del columns['truth']
  return columns
