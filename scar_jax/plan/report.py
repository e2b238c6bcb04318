"""A plan as figures, as JSON and as lines on a terminal.

In: a `Setup`, its compiled `Program`, the topology. Out: one dict with the keys
that `--json` writes, and its text. Called by `scar plan` and by `search.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from scar_jax.flops import sample_flops
from scar_jax.plan.activations import saved_bytes
from scar_jax.plan.chips import GIB, Topology
from scar_jax.plan.collectives import Collective
from scar_jax.plan.compile import Program, Setup
from scar_jax.plan.costs import count
from scar_jax.plan.hlo import parse
from scar_jax.plan.roofline import Coords, exchange_seconds, roofline
from scar_jax.sampling_loop import branch_count, cache_size
from scar_jax.sampling_steps import split_scales
from scar_jax.sharding import batch_ways
from scar_jax.train.tasks import optional

Report = dict[str, Any]


def make_report(
  setup: Setup, program: Program, topology: Topology, what: str
) -> Report:
  """All figures of one program.

  Args:
    setup: what was compiled.
    program: the result.
    topology: for which.
    what: 'train' or 'sample'.
  """
  config, chips = setup.config, topology.chips
  batch = config.data.batch
  analytic = _analytic(setup, what)
  memory = program.memory
  report: Report = {
    'program': what,
    'task': config.task,
    'topology': topology.name,
    'chips': chips,
    'mesh': program.mesh,
    'batch': batch,
    'accum': config.train.accum,
    'remat': getattr(config.model, 'remat', ''),
    'quick': setup.quick,
    'cached_tokens': 'tokens' in setup.batch,
    'fits': memory.total <= topology.chip.hbm,
    'hbm_bytes': memory.total,
    'hbm_limit_bytes': float(topology.chip.hbm),
    'memory': memory.parts,
    'params': sum(
      leaf.size for leaf in jax.tree.leaves(setup.assembly.shapes.params)
    ),
    'compile_seconds': program.seconds,
    'flops_analytic': sum(analytic.values()),
    'flops_parts': analytic,
  }
  if not program.text:
    return report
  module = parse(program.text)
  costs = count(module, program.mesh, program.kernels)
  report['memory'] = _with_activations(memory.parts, saved_bytes(module))
  if what == 'sample' and setup.task.editor.model.order == 'raster':
    report['decode_bytes'] = costs.turn_bytes()
    report['decode_bytes_least'] = _decode_least(setup)
  line = roofline(costs, topology.chip, program.coords)
  total = report['flops_analytic']
  peak = chips * topology.chip.flops
  return report | {
    'flops_per_chip': costs.flops,
    'flops_kernels': costs.kernel_flops,
    'flops_ratio': costs.flops * chips / total if total else math.nan,
    'bytes_per_chip': costs.bytes,
    'unknown_loops': costs.unknown_loops,
    'collectives': _listed(costs.collectives, topology, program.coords),
    'compute_seconds': line.compute,
    'hbm_seconds': line.hbm,
    'interconnect_seconds': line.interconnect,
    'waiting_seconds': line.waiting,
    'step_seconds_roofline': line.step,
    'images_per_second': batch / line.step if line.step else math.nan,
    'mfu_bound': total / (line.step * peak) if line.step else math.nan,
    'binds': line.binds,
  }


def _analytic(setup: Setup, what: str) -> dict[str, float]:
  task, batch = setup.task, setup.config.data.batch
  if what == 'train':
    flops = optional(task, 'flops')
    parts = flops(batch) if flops else {}
    if 'tokens' in setup.batch:
      parts.pop('tokenizer', None)
    return parts
  mode = split_scales(task.editor.sample)[1].guidance_mode
  return sample_flops(
    task.editor.model,
    batch,
    branch_count(mode),
    task.parts.configs,
    task.editor.image_size,
  )


def _with_activations(
  parts: Mapping[str, float], saved: float
) -> dict[str, float]:
  """Temporaries without what they hold for the backward pass."""
  saved = min(saved, parts.get('temporaries', 0.0))
  if not saved:
    return dict(parts)
  rest = {k: v for k, v in parts.items() if k != 'temporaries'}
  return rest | {
    'activations': saved,
    'temporaries': parts['temporaries'] - saved,
  }


def _decode_least(setup: Setup) -> float:
  """Bytes that a decoding step must read: weights and cache of one chip."""
  editor, mesh = setup.task.editor, setup.mesh
  cfg = editor.model.decoder
  width = jnp.dtype(cfg.dtype).itemsize
  decoder = setup.assembly.shapes.params['decoder']
  weights = sum(
    leaf.size
    for name in ('layers', 'head')
    for leaf in jax.tree.leaves(decoder[name])
  )
  mode = split_scales(editor.sample)[1].guidance_mode
  rows = setup.config.data.batch * branch_count(mode) / batch_ways(mesh)
  slots = cache_size(editor.model.make_layout().length)
  cache = 2 * cfg.layers * rows * slots * cfg.width
  return (weights + cache) * width / mesh.shape['tensor']


def _listed(
  collectives: Sequence[Collective], topology: Topology, coords: Coords
) -> list[dict[str, Any]]:
  """One entry for each kind and set of axes; bytes are sent by one chip."""
  found: dict[tuple[str, str], dict[str, Any]] = {}
  for exchange in collectives:
    if exchange.group < 2:
      continue
    key = (exchange.kind, '+'.join(exchange.axes))
    entry = found.setdefault(
      key,
      dict(
        kind=key[0], axes=key[1], count=0, bytes=0.0, overlapped_bytes=0.0,
        seconds=0.0,
      ),
    )  # fmt: skip
    sent = exchange.trips * exchange.sent
    entry['count'] += exchange.trips
    entry['bytes'] += sent
    entry['overlapped_bytes'] += sent if exchange.overlaps else 0.0
    entry['seconds'] += exchange.trips * exchange_seconds(
      exchange, topology.chip, coords
    )
  return sorted(found.values(), key=lambda entry: -entry['seconds'])


def verdict(report: Mapping[str, Any]) -> str:
  """Fits or not, in one line."""
  needs = report['hbm_bytes'] / GIB
  there = report['hbm_limit_bytes'] / GIB
  if report['fits']:
    return f'fits: {needs:.2f} of {there:.2f} GiB HBM per chip'
  return f'does not fit: needs {needs:.2f} GiB of {there:.2f} GiB HBM per chip'


def lines(report: Mapping[str, Any]) -> list[str]:
  """The report as text, a figure a line."""
  mesh = ' '.join(f'{a}:{n}' for a, n in report['mesh'].items() if n > 1)
  program = {'train': 'training step', 'sample': 'sampler'}[report['program']]
  shown = [
    f'{program} on {report["topology"]}, {report["chips"]} chips, mesh '
    f'{mesh or "data:1"}, batch {report["batch"]}, '
    f'{report["accum"]} microbatch(es), remat {report["remat"] or "none"}',
    _line('parameters', f'{report["params"] / 1e6:,.1f} M'),
    _line('memory', verdict(report)),
  ]
  for name, size in report['memory'].items():
    shown.append(_line(f'  {name}', f'{size / GIB:.2f} GiB'))
  parts = ', '.join(
    f'{name} {flops / report["flops_analytic"]:.0%}'
    for name, flops in report['flops_parts'].items()
  )
  if parts:
    text = f'{report["flops_analytic"] / 1e12:,.1f} TFLOP needed ({parts})'
    shown.append(_line('FLOPs', text))
  shown.append(_line('compile time', f'{report["compile_seconds"]:.0f} s'))
  if 'binds' not in report:
    return shown
  per_chip = report['flops_per_chip'] / 1e12
  shown += [
    _line(
      'FLOPs per chip',
      f'{per_chip:,.2f} TFLOP compiled, {report["flops_ratio"]:.2f} of what '
      f'is needed; {report["flops_kernels"] / 1e12:,.2f} in attention kernels',
    ),
    _line('HBM traffic', f'{report["bytes_per_chip"] / GIB:,.1f} GiB per chip'),
  ]
  for entry in report['collectives']:
    share = entry['overlapped_bytes'] / entry['bytes'] if entry['bytes'] else 0
    shown.append(
      _line(
        f'  {entry["kind"]}',
        f'over {entry["axes"]}: {entry["count"]}, '
        f'{entry["bytes"] / GIB:.2f} GiB sent per chip, {share:.0%} '
        f'overlapped, {1e3 * entry["seconds"]:.1f} ms',
      )
    )
  if 'decode_bytes' in report:
    ratio = report['decode_bytes'] / report['decode_bytes_least']
    shown.append(
      _line(
        'decoding step',
        f'{report["decode_bytes"] / GIB:.2f} GiB of HBM per chip, {ratio:.2f} '
        'of weights and whole cache',
      )
    )
  milli = {
    name: f'{1e3 * report[f"{name}_seconds"]:.1f} ms'
    for name in ('compute', 'hbm', 'interconnect', 'waiting')
  }
  shown += [
    _line(
      'roofline',
      f'compute {milli["compute"]}, HBM {milli["hbm"]}, interconnect '
      f'{milli["interconnect"]} (of which nothing hides {milli["waiting"]}); '
      f'{report["binds"]} binds',
    ),
    _line(
      'at best',
      f'{1e3 * report["step_seconds_roofline"]:.1f} ms, '
      f'{report["images_per_second"]:,.1f} images/s, '
      f'MFU {report["mfu_bound"]:.1%}',
    ),
  ]
  if report['unknown_loops']:
    shown.append(
      _line('note', f'{report["unknown_loops"]} loops of unknown length, once')
    )
  return shown


def _line(name: str, text: str) -> str:
  return f'  {name:<18} {text}'
