"""`scar data`: what a data set holds, before training on it.

In: `inspect` and a config, or `seeds` and a folder of InstructPix2Pix. Out:
tables of counts and sizes, bad records with reasons, the speed of the input
pipeline, and a page of pictures as the model gets them.
"""

import dataclasses
import itertools
import json
import pathlib
import time
from typing import Any

from absl import flags

from scar_jax.commands.parsing import Args, load_config
from scar_jax.config_values import nearest

ABOUT = 'Look at a data set: counts, sizes, bad records, speed, pictures.'
EXAMPLE = (
  'scar data inspect --config=configs/openmoji.py:edit --page=data.png '
  '--config.data.source=jsonl --config.data.path=pairs.jsonl'
)
WITH_CONFIG = True
POSITIONAL = 'name'
TASKS = {
  'inspect': 'counts, statistics, bad records, speed and a page of pictures',
  'seeds': 'writes seeds.json of an InstructPix2Pix folder',
}
_LISTED = 10
_AHEAD = 6  # batches that the loader may hold ready


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  known = '; '.join(f'{name}: {about}' for name, about in TASKS.items())
  for name, about in {
    'name': f'Of {known}.',
    'config': 'Config file, and after a colon its variant.',
    'page': 'PNG file for pictures, captions and controls.',
    'json': 'File for all numbers.',
    'path': 'Folder, for seeds.',
  }.items():
    flags.DEFINE_string(name, None, about, flag_values=values)
  for name, (default, low, about) in {
    'records': (200, 0, 'Records looked at, spread over all; 0 is all.'),
    'rows': (12, 1, 'Records on the page.'),
    'batches': (8, 0, 'Batches timed; 0 times none.'),
  }.items():
    flags.DEFINE_integer(
      name, default, about, lower_bound=low, flag_values=values
    )


def run(args: Args) -> str:
  """Does what `name` says; returns the closing line.

  Raises:
    ValueError: an unknown name, no config, or data that cannot be used.
  """
  given = args.flags
  if given.name == 'seeds':
    return _seeds(given.path)
  if given.name != 'inspect':
    raise ValueError(
      f'scar data {given.name!r} is unknown.{nearest(given.name or "", TASKS)}'
      f' Known: {", ".join(TASKS)}. Example: {EXAMPLE}'
    )
  if not given.config:
    raise ValueError(f'scar data inspect needs --config. Example: {EXAMPLE}')
  return _inspect(args)


def _inspect(args: Args) -> str:
  from scar_jax import config as config_lib
  from scar_jax.commands.console import say
  from scar_jax.data.sources import make_source
  from scar_jax.data.survey import spread, survey
  from scar_jax.data.text import make_text
  from scar_jax.eval import report
  from scar_jax.train.inputs import make_loader

  given = args.flags
  config = config_lib.check(load_config(given.config, args.overrides))
  # Bad records are what is asked for here: none of them stops the command.
  data = dataclasses.replace(config.data, strict=False, max_bad_share=1.0)
  config = dataclasses.replace(config, data=data)
  source = make_source(data)
  say(source.describe())
  wanted = config.text is not None and config.text.kind in ('byte', 't5')
  text = make_text(config.text) if wanted else None
  found = survey(source, text, spread(len(source), given.records))
  report.print_table(found.table(), title=f'{found.seen} of {found.records}')
  say(
    f'unreadable: {len(found.bad)} of {found.seen}'
    f' ({100 * found.unreadable:.2f} %); texts cut: {found.cut}; classes seen:'
    f' {len(found.labels)}'
  )
  for bad in found.bad[:_LISTED]:
    say(f'  {bad}')
  if len(found.bad) > _LISTED:
    say(f'  and {len(found.bad) - _LISTED} more: {found.reasons()}')
  summary = {'source': source.describe(), **found.summary()}
  if len(found.bad) < found.seen and (given.batches or given.page):
    loader = make_loader(config)
    try:
      if given.batches:
        summary['images_per_second'] = _speed(loader, given.batches)
        say(
          f'pipeline: {summary["images_per_second"]:.1f} records/s with'
          f' data.workers={config.data.workers}, over {given.batches} batches'
          f' of {config.data.batch}'
        )
      if given.page:
        _page(given.page, loader.plan, given.rows)
    finally:
      loader.close()
  if given.json:
    report.write_json(given.json, summary)
  written = [path for path in (given.page, given.json) if path]
  return ', '.join(written) or 'done'


def _speed(loader: Any, batches: int) -> float:
  """Records per second, once those loaded ahead are taken."""
  for _ in range(_AHEAD):
    next(loader)
  start, rows = time.perf_counter(), 0
  for _ in range(batches):
    rows += len(next(loader)['index'])
  return rows / (time.perf_counter() - start)


def _page(path: str, plan: Any, rows: int) -> None:
  """Writes the first rows of the stream, beside the words of their records."""
  from scar_jax.data.geometry import resize, to_uint8
  from scar_jax.eval.report import write_grid

  columns: dict[str, list[Any]] = {'record': [], 'text': []}
  for k in itertools.count():
    batch, bad = plan.load(0, k)
    reasons = {each.index: each.reason for each in bad}
    for row, index in enumerate(batch['index'].tolist()):
      if len(columns['record']) == rows:
        break
      if not batch['valid'][row]:
        columns['record'].append(f'{index}: cannot be used')
        columns['text'].append(reasons.get(index, ''))
      else:
        record, _ = plan.record(index, k * plan.batch + plan.rows[row])
        label = '' if record.label is None else f' [{record.label}]'
        # The end tells records apart; the start may be a long folder.
        columns['record'].append(f'{record.key[-18:]}{label}')
        columns['text'].append(record.text)
      for name in ('condition', 'target'):
        if name not in batch:
          continue
        shown = to_uint8(batch[name][row])
        side = min(160, max(shown.shape[:2]))
        scale = side / max(shown.shape[:2])
        size = tuple(max(1, round(scale * s)) for s in shown.shape[:2])
        shown = resize(shown, (size[0], size[1]))
        columns.setdefault(name, []).append(shown)
    if len(columns['record']) == rows:
      break
  about = plan.source.describe()
  write_grid(path, columns, title=about, blocks=1 + (rows > 8))


def _seeds(path: str | None) -> str:
  from scar_jax.data.sources.ip2p import make_seeds
  from scar_jax.eval.report import write_atomic

  root = pathlib.Path(path or '')
  if not path or not root.is_dir():
    raise ValueError(
      f'--path={path!r} is no folder; scar data seeds needs the folder of'
      ' InstructPix2Pix, with <name>/prompt.json'
    )
  seeds = make_seeds(root)
  if not seeds:
    raise ValueError(f'{root} has no <name>/prompt.json with its pictures')
  target = root / 'seeds.json'
  if target.exists():
    raise ValueError(f'{target} is there already; remove it to write it anew')
  write_atomic(target, lambda file: file.write(json.dumps(seeds).encode()))
  return f'{target}: {len(seeds)} names'
