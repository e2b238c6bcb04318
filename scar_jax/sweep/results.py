"""What a sweep says: numbers of every run, a table over seeds, a picture.

In: jobs and how they stand. Out: `results.json`, `table.md` and `plot.png` in
the sweep's directory. Called by `commands/sweep.py`.
"""

import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scar_jax.eval.report import write_atomic, write_json
from scar_jax.eval.tables import Column, Table
from scar_jax.extras import require
from scar_jax.sweep.execute import DONE, FAILED, Outcome
from scar_jax.sweep.spec import Job, SweepSpec

NOT_TRIED = 'not tried'


def measured(spec: SweepSpec, job: Job) -> dict[str, float]:
  """The measures of a finished run, by their key.

  Raises:
    ValueError: `scores.json` does not hold one of them.
  """
  splits = json.loads(job.scores.read_text())['splits']
  found = {}
  for measure in spec.measures:
    value: Any = splits
    for part in measure.key.split('.'):
      if not isinstance(value, Mapping) or part not in value:
        known = list(value) if isinstance(value, Mapping) else type(value)
        raise ValueError(
          f'{job.scores}: no {measure.key!r}; found instead of {part!r}: '
          f'{known} (measures of the sweep)'
        )
      value = value[part]
    found[measure.key] = math.nan if value is None else float(value)
  return found


def gather(
  spec: SweepSpec, jobs: Sequence[Job], outcomes: Mapping[str, Outcome]
) -> list[dict[str, Any]]:
  """A row for each run: point, seed, status, measures."""
  rows = []
  for job in jobs:
    if not job.point:
      continue
    state = outcomes.get(job.name, Outcome())
    values = measured(spec, job) if state.status == DONE else {}
    rows.append(
      {
        'point': job.point,
        'seed': job.seed,
        'status': state.status or NOT_TRIED,
        'seconds': state.seconds,
        'workdir': job.workdir,
        'measures': values,
        'error': state.error,
      }
    )
  return rows


def over_seeds(
  rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Point -> measure -> (mean, deviation), and `n` runs.

  The deviation is that of a sample (n - 1); of one run there is none.
  """
  summary: dict[str, dict[str, Any]] = {}
  for point in dict.fromkeys(row['point'] for row in rows):
    done = [
      row['measures']
      for row in rows
      if row['point'] == point and row['status'] == DONE
    ]
    summary[point] = {'n': len(done)}
    for key in done[0] if done else ():
      values = [v for m in done if math.isfinite(v := m[key])]
      mean = statistics.fmean(values) if values else math.nan
      spread = statistics.stdev(values) if len(values) > 1 else math.nan
      summary[point][key] = (mean, spread)
  return summary


def tables(
  spec: SweepSpec, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Table]:
  """Ours, and the paper's own ablation where the sweep names it."""
  columns = tuple(
    Column(m.key, m.title, m.better, m.digits) for m in spec.measures
  )
  begun = [
    f'{row["point"]}, seed {row["seed"]}: {row["status"]}'
    for row in rows
    if row['status'] not in (DONE, NOT_TRIED)
  ]
  waiting = sum(row['status'] == NOT_TRIED for row in rows)
  notes = ['Mean and deviation over seeds; n runs.']
  if begun:
    notes.append(f'Without a number: {"; ".join(begun)}.')
  if waiting:
    notes.append(f'Not tried yet: {waiting} of {len(rows)} runs.')
  found = {
    spec.title: Table(
      'point',
      (*columns, Column('n', 'n', digits=0)),
      over_seeds(rows),
      notes=tuple(notes),
    )
  }
  if spec.paper:
    names = [title for title, _ in spec.paper_columns]
    found['The same ablation in the paper'] = Table(
      'point',
      tuple(
        Column(title, title, better) for title, better in spec.paper_columns
      ),
      {
        name: dict(zip(names, values, strict=True))
        for name, values in spec.paper
      },
    )
  return found


def write(
  spec: SweepSpec, rows: Sequence[Mapping[str, Any]], workdir: pathlib.Path
) -> None:
  """Writes the files; the picture only if matplotlib is installed."""
  summary = over_seeds(rows)
  write_json(
    workdir / 'results.json',
    {'title': spec.title, 'points': summary, 'runs': rows},
  )
  text = '\n'.join(
    f'## {heading}\n\n{table.markdown()}'
    for heading, table in tables(spec, rows).items()
  )
  write_atomic(workdir / 'table.md', lambda file: file.write(text.encode()))
  if spec.measures and any(row['status'] == DONE for row in rows):
    draw(spec, rows, workdir / 'plot.png')


def draw(
  spec: SweepSpec, rows: Sequence[Mapping[str, Any]], path: pathlib.Path
) -> None:
  """A panel for each measure: every run, mean and deviation of every point.

  Raises:
    ValueError: matplotlib is not installed.
  """
  require('matplotlib', 'eval')
  from matplotlib.figure import Figure

  summary = over_seeds(rows)
  names = list(summary)
  height = 1.2 + 0.32 * len(names)
  figure = Figure(
    figsize=(4.2 * len(spec.measures) + 1, height), layout='tight'
  )
  panels = figure.subplots(1, len(spec.measures), squeeze=False, sharey=True)[0]
  for panel, measure in zip(panels, spec.measures, strict=True):
    for at, name in enumerate(names):
      runs = [
        row['measures'][measure.key]
        for row in rows
        if row['point'] == name and row['status'] == DONE
      ]
      panel.plot(runs, [at] * len(runs), '.', color='#bbbbbb', markersize=7)
      if measure.key in summary[name]:
        mean, spread = summary[name][measure.key]
        error = None if math.isnan(spread) else spread
        panel.errorbar(
          mean, at, xerr=error, fmt='o', color='#4477aa', capsize=3
        )
    arrow = {'up': '→', 'down': '←'}.get(measure.better, '')
    panel.set_xlabel(f'{measure.title} ({arrow} is better)')
    panel.set_yticks(range(len(names)), names)
    panel.grid(axis='x', alpha=0.3)
  panels[0].set_ylim(len(names) - 0.5, -0.5)  # the first point above
  figure.suptitle(spec.title)
  write_atomic(path, lambda file: figure.savefig(file, format='png', dpi=150))


def failures(rows: Sequence[Mapping[str, Any]]) -> int:
  """How many runs failed."""
  return sum(row['status'] == FAILED for row in rows)
