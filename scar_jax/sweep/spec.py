"""What a sweep consists of: stages made once, points, seeds, commands.

In: a file such as `configs/sweeps/delta.py`, whose `get_sweep(arg)` returns a
ConfigDict with the fields of `SweepSpec`. Out: the jobs in the order in which
they run. Called by `commands/sweep.py`.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from scar_jax.config_values import number, read_section

Pairs = tuple[tuple[str, Any], ...]
# Fields of `zip` and `grid` that are no config fields: the recipe itself, and
# what a point is called.
_CONFIG, _NAME = 'config', 'name'


@dataclasses.dataclass(frozen=True)
class Stage:
  """A run that all points build on, such as their tokenizer.

  Attributes:
    name: what `{name}` stands for in values: its work directory.
    config: file and variant.
    set: overrides, (field, value).
  """

  name: str
  config: str
  set: Pairs = ()


@dataclasses.dataclass(frozen=True)
class Measure:
  """A number of `scores.json` that the table shows.

  Attributes:
    key: path below `splits`, such as `held_out.exact`.
    title: of the column.
    better: 'up' or 'down'.
    digits: behind the point.
  """

  key: str
  title: str
  better: str = 'up'
  digits: int = number(3, 0)


@dataclasses.dataclass(frozen=True)
class SweepSpec:
  """A sweep.

  Attributes:
    title: of the table.
    config: file and variant of every point.
    set: overrides of every point, (field, value).
    grid: (field, values); every combination is a point.
    zip: (field, values), all equally long, which change together; combined
      with the grid. The fields `config` and `name` are the recipe of a point
      and what it is called.
    seeds: of every point.
    stages: see `Stage`.
    score: words of `scar eval`; () trains only.
    measures: columns of the table.
    paper: (row, numbers) of the paper's own ablation, to stand below ours.
    paper_columns: (title, better) of these numbers.
  """

  title: str
  config: str
  set: Pairs = ()
  grid: Pairs = ()
  zip: Pairs = ()
  seeds: tuple[int, ...] = (0, 1, 2)
  stages: tuple[Stage, ...] = ()
  score: tuple[str, ...] = ()
  measures: tuple[Measure, ...] = ()
  paper: Pairs = ()
  paper_columns: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
  """One stage, or one point with one seed.

  Attributes:
    name: path below the sweep's directory.
    point: name of the point; '' of a stage.
    seed: of the run.
    config: file and variant.
    overrides: (field, text).
    workdir: where it is trained.
    score: words of `scar eval`, or ().
  """

  name: str
  point: str
  seed: int
  config: str
  overrides: tuple[tuple[str, str], ...]
  workdir: str
  score: tuple[str, ...] = ()

  @property
  def words(self) -> list[str]:
    """Overrides as words of a command line."""
    return [f'--config.{field}={value}' for field, value in self.overrides]

  @property
  def commands(self) -> list[list[str]]:
    """Words of `scar`: training, then scoring."""
    train = [
      'train', f'--config={self.config}', f'--workdir={self.workdir}',
      *self.words,
    ]  # fmt: skip
    if not self.score:
      return [train]
    places = [f'--workdir={self.workdir}', f'--json={self.scores}']
    return [train, ['eval', *places, *self.score]]

  @property
  def scores(self) -> pathlib.Path:
    """Where `scar eval` leaves its numbers."""
    return pathlib.Path(self.workdir) / 'scores.json'


def read_spec(raw: ConfigDict | dict[str, Any], path: str) -> SweepSpec:
  """Judges what `get_sweep` returned.

  Args:
    raw: the fields.
    path: of the file, for messages.

  Raises:
    ValueError: an unknown field, a wrong type, lists of different lengths.
  """
  values = raw.to_dict() if isinstance(raw, ConfigDict) else dict(raw)
  try:
    spec = read_section('sweep', SweepSpec, values)
  except ValueError as error:
    raise ValueError(f'--sweep={path}: {error}') from error
  for field, listed in (*spec.grid, *spec.zip):
    if not isinstance(listed, tuple | list) or not listed:
      raise ValueError(
        f'--sweep={path}: {field}={listed!r}; accepted: a list of values'
      )
  lengths = {field: len(listed) for field, listed in spec.zip}
  if len(set(lengths.values())) > 1:
    raise ValueError(
      f'--sweep={path}: zip of lengths {lengths}; accepted: one length'
    )
  if not spec.seeds or len(set(spec.seeds)) < len(spec.seeds):
    raise ValueError(
      f'--sweep={path}: seeds={spec.seeds}; accepted: at least one, none twice'
    )
  return spec


def points(spec: SweepSpec) -> list[tuple[str, Pairs]]:
  """(name, overrides) of every point, the grid's last field fastest.

  Raises:
    ValueError: two points of one name.
  """
  together: list[Pairs] = [()]
  if spec.zip:
    fields = [field for field, _ in spec.zip]
    rows = zip(*(listed for _, listed in spec.zip), strict=True)
    together = [tuple(zip(fields, row, strict=True)) for row in rows]
  grid = [
    tuple(zip([field for field, _ in spec.grid], row, strict=True))
    for row in itertools.product(*(listed for _, listed in spec.grid))
  ]
  found = [
    (_point_name(a + b), a + b) for a, b in itertools.product(together, grid)
  ]
  names = [name for name, _ in found]
  twice = {name for name in names if names.count(name) > 1}
  if twice:
    raise ValueError(
      f'points of one name: {", ".join(sorted(twice))}; accepted: names of '
      'their own (field `name` of zip)'
    )
  return found


def _point_name(values: Pairs) -> str:
  given = dict(values)
  parts = [str(given[_NAME])] if _NAME in given else []
  # A name says what its zip says; the grid beside it is not in it.
  parts += [
    f'{field.rpartition(".")[2]}={value}'
    for field, value in values
    if field not in (_NAME, _CONFIG) and _NAME not in given
  ]
  return ','.join(parts) or 'only'


def jobs(
  spec: SweepSpec, workdir: str, overrides: dict[str, str] | None = None
) -> list[Job]:
  """Stages, then every point with every seed.

  Seeds go round the points: a sweep that is cut short has compared all points
  at least once.

  Args:
    spec: of the sweep.
    workdir: of the sweep.
    overrides: of every point, from the command line.
  """
  root = pathlib.Path(workdir)
  places = {
    stage.name: str(root / 'stages' / stage.name) for stage in spec.stages
  }
  listed = [
    Job(
      name=f'stages/{stage.name}',
      point='',
      seed=0,
      config=stage.config,
      overrides=_filled(stage.set, places),
      workdir=places[stage.name],
    )
    for stage in spec.stages
  ]
  for seed, (name, values) in itertools.product(spec.seeds, points(spec)):
    plain = re.sub(r'[^\w.=,+-]', '_', name)
    folder = f'runs/{plain}/seed{seed}'
    own = tuple(pair for pair in values if pair[0] not in (_NAME, _CONFIG))
    fields: Pairs = (
      *spec.set, *own, *(overrides or {}).items(), ('seed', seed),
    )  # fmt: skip
    listed.append(
      Job(
        name=folder,
        point=name,
        seed=seed,
        config=str(dict(values).get(_CONFIG, spec.config)),
        overrides=_filled(fields, places),
        workdir=str(root / folder),
        score=spec.score,
      )
    )
  return listed


def _filled(
  pairs: Sequence[tuple[str, Any]], places: dict[str, str]
) -> tuple[tuple[str, str], ...]:
  """Fields as text, the later of two winning, `{stage}` as its directory."""
  found: dict[str, str] = {}
  for field, value in pairs:
    if isinstance(value, tuple | list):
      value = ','.join(map(str, value))
    text = str(value)
    for name in re.findall(r'\{(\w+)\}', text):
      if name not in places:
        raise ValueError(
          f'{field}={text!r} names no stage; accepted: '
          f'{", ".join(places) or "none, the sweep has no stages"}'
        )
      text = text.replace(f'{{{name}}}', places[name])
    found[field] = text
  return tuple(found.items())
