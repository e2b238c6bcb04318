"""`scar plan`: what a program needs on a TPU topology, before anyone pays.

In: a config file and a topology. Out: lines on the terminal, and where asked
the same figures as JSON and a picture. Everything is in `scar_jax/plan/`.
"""

from typing import Any

from absl import flags

from scar_jax.commands.parsing import Args, load_config
from scar_jax.config_values import nearest

ABOUT = 'Compile for a TPU topology: memory, FLOPs, exchanges, time at best.'
EXAMPLE = (
  'scar plan --config=configs/edit512.py:size=XL --topology=v5e:4x4 '
  '--mesh=fsdp:16 --batch=64'
)
WITH_CONFIG = True


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  for name, about in {
    'config': 'Config file, and after a colon its variant.',
    'topology': 'Chips, such as v5e:16x16 or v5p:4x4x4; v5e:16x16*2 is two '
    'slices.',
    'mesh': 'Sizes of its axes, such as data:-1,fsdp:16,tensor:4; by default '
    'those of the config.',
    'chip': 'Fields of another chip of this topology, such as '
    'hbm=34359738368,flops=5e14.',
    'json': 'File for the figures.',
    'picture': 'PNG file: bars of memory and of time.',
  }.items():
    flags.DEFINE_string(name, '', about, flag_values=values)
  flags.DEFINE_integer(
    'batch', None, 'Images of a step, or made together; by default of config.',
    lower_bound=1, flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'sample', False, 'The sampler instead of the training step.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'quick', False,
    'Compile with little effort: sooner; memory is a GiB or two off, '
    'and times at best are longer.', flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'cached_tokens', False, 'Target tokens come from a cache of `scar '
    'tokenize`: no tokenizer in the training step.', flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'search', False, 'Try meshes, microbatches and remat policies.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    'tries', 24, 'Programs that a search compiles at most.',
    lower_bound=1, flag_values=values,
  )  # fmt: skip


def run(args: Args) -> str:
  """Plans; returns the closing line.

  Raises:
    ValueError: see `config.check`, `plan.chips` and `plan.compile`.
  """
  given = args.flags
  for name in ('config', 'topology'):
    if not given[name].value:
      raise ValueError(f'scar plan needs --{name}. Example: {EXAMPLE}')
  for name in ('search', 'cached_tokens'):
    if given[name].value and given.sample:
      raise ValueError(
        f'--{name} with --sample; accepted: one of them (it is about training '
        'steps)'
      )
  from scar_jax import config as config_lib
  from scar_jax.commands.console import say
  from scar_jax.eval.report import write_json
  from scar_jax.plan import compile as compile_lib
  from scar_jax.plan.chips import read_topology
  from scar_jax.plan.picture import draw
  from scar_jax.plan.report import lines, make_report, verdict

  topology = read_topology(given.topology, given.chip)
  overrides = args.overrides | mesh_overrides(given.mesh)
  if given.batch is not None:
    overrides['data.batch'] = str(given.batch)
  config = config_lib.check(load_config(given.config, overrides))
  compile_lib.prepare_environment()
  if given.search:
    report, rows = _search(config, topology, given)
  else:
    what = 'sample' if given.sample else 'train'
    say(f'compiling {what} of {given.config} for {topology.name}')
    setup = compile_lib.set_up(
      config, topology, given.quick, given.cached_tokens
    )
    compiler = getattr(compile_lib, f'compile_{what}')
    report = make_report(setup, compiler(setup), topology, what)
    rows = None
  report['config'] = given.config
  for line in lines(report):
    say(line)
  if given.json:
    write_json(given.json, report if rows is None else {**report, 'rows': rows})
  if given.picture:
    draw(report, given.picture)
  return verdict(report)


def mesh_overrides(text: str) -> dict[str, str]:
  """`data:-1,fsdp:16` as config fields; axes that are not named become 1.

  Raises:
    ValueError: an unknown axis, or no size.
  """
  from scar_jax.sharding import MESH_AXES

  if not text:
    return {}
  sizes = dict.fromkeys(MESH_AXES, '1')
  for part in text.split(','):
    axis, sep, size = part.strip().partition(':')
    if axis not in sizes or not sep:
      raise ValueError(
        f'mesh={part!r}; accepted: AXIS:SIZE of {", ".join(MESH_AXES)}.'
        f'{nearest(axis, MESH_AXES)} (set --mesh=data:-1,fsdp:16)'
      )
    sizes[axis] = size
  return {f'mesh.{axis}': size for axis, size in sizes.items()}


def _search(
  config: Any, topology: Any, given: flags.FlagValues
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The best report, and a row for each try."""
  from scar_jax.commands.console import say
  from scar_jax.eval.report import print_table
  from scar_jax.plan.report import verdict
  from scar_jax.plan.search import label, row, search

  say(f'searching for {topology.name}, {given.tries} programs at most')
  reports = search(
    config,
    topology,
    given.tries,
    given.quick,
    given.cached_tokens,
    lambda r: say(f'  {label(r)}: {verdict(r)}'),
  )
  if not reports:
    raise ValueError(
      f'no mesh of {topology.chips} chips divides batch '
      f'{config.data.batch} (set --batch)'
    )
  table = {label(r): row(r) for r in reports}
  print_table(table, title=f'{topology.name}, batch {config.data.batch}')
  return reports[0], [
    {'variant': name} | cells for name, cells in table.items()
  ]
