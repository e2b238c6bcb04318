"""Which mesh, microbatches and rematerialisation are the fastest that fit.

In: a checked config and a topology. Out: a row for each program that was
compiled, the best first. More rematerialisation takes less memory and more
time, so each mesh and number of microbatches stops at the first policy that
fits, and each mesh at the first that fits without rematerialisation.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from scar_jax.config import Config
from scar_jax.models.decoder import REMAT, decoder_size
from scar_jax.plan.chips import GIB, Topology
from scar_jax.plan.compile import compile_train, set_up
from scar_jax.plan.report import Report, make_report

_ACCUM = (1, 2, 4, 8)
_TENSOR = (1, 2, 4, 8)
# From no recomputation to the most; what waits on the host is not tried.
_LIGHTEST_FIRST = ('none', 'dots', 'dots_no_batch', 'attention', 'full')
REMAT_BY_COST = tuple(name for name in _LIGHTEST_FIRST if name in REMAT)


def search(
  config: Config,
  topology: Topology,
  tries: int = 24,
  quick: bool = False,
  cached_tokens: bool = False,
  tell: Callable[[Report], Any] = lambda report: None,
) -> list[Report]:
  """Compiles until the meshes or the tries are used up.

  Args:
    config: checked; its mesh, accum and remat are replaced.
    topology: for which.
    tries: programs to compile at most.
    quick: see `compile.Setup`.
    cached_tokens: see `compile.abstract_batch`.
    tell: called with each report as it comes.

  Returns:
    Reports: those that fit by images per second, then the others.

  Raises:
    ValueError: a task without a decoder.
  """
  if config.task != 'scar':
    raise ValueError(
      f"--search with task={config.task!r}; accepted: task='scar' "
      '(set --config)'
    )
  reports: list[Report] = []
  heads = config.model.heads or decoder_size(config.model.size).heads
  for mesh in meshes(topology, heads):
    ways = topology.chips // mesh['tensor']
    for accum in _ACCUM:
      if config.data.batch % (ways * accum):
        break
      fitted = ''
      for remat in REMAT_BY_COST:
        if len(reports) >= tries:
          return _sorted(reports)
        variant = _variant(config, mesh, accum, remat)
        setup = set_up(variant, topology, quick, cached_tokens)
        report = make_report(setup, compile_train(setup), topology, 'train')
        reports.append(report)
        tell(report)
        if report['fits']:
          fitted = remat
          break
      if fitted == REMAT_BY_COST[0]:
        break
  return _sorted(reports)


def meshes(topology: Topology, heads: int) -> Iterator[dict[str, int]]:
  """Meshes of a topology, those with less exchange first.

  Parameters are split over all chips that share no tensor axis, or over 64, 16
  or 4 of them with copies (`data`); slices are copies (`replica`).

  Args:
    topology: for which.
    heads: of the model, which a tensor axis must divide.
  """
  chips = topology.chips // topology.slices
  for tensor in _TENSOR:
    if chips % tensor or heads % tensor:
      continue
    rest = chips // tensor
    sizes = dict.fromkeys((rest, 64, 16, 4))
    for fsdp in (n for n in sizes if n <= rest and rest % n == 0):
      yield {
        'replica': topology.slices,
        'data': rest // fsdp,
        'fsdp': fsdp,
        'tensor': tensor,
      }


def _variant(
  config: Config, mesh: dict[str, int], accum: int, remat: str
) -> Config:
  model = dataclasses.replace(config.model, remat=remat)
  return dataclasses.replace(
    config,
    mesh=dataclasses.replace(config.mesh, **mesh),
    train=dataclasses.replace(config.train, accum=accum),
    model=model,
  )


def _sorted(reports: list[Report]) -> list[Report]:
  return sorted(
    reports,
    key=lambda r: (not r['fits'], -r.get('images_per_second', 0.0)),
  )


def row(report: Report) -> dict[str, Any]:
  """A line of the table of a search."""
  seconds = report.get('step_seconds_roofline')
  return {
    'fits': 'yes' if report['fits'] else 'no',
    'HBM GiB': report['hbm_bytes'] / GIB,
    # Of those that are needed: what rematerialisation costs.
    'FLOPs': report.get('flops_ratio'),
    'step ms': None if seconds is None else 1e3 * seconds,
    'images/s': report.get('images_per_second'),
    'MFU': report.get('mfu_bound'),
  }


def label(report: Report) -> str:
  """Names a variant."""
  mesh = ','.join(f'{a}:{n}' for a, n in report['mesh'].items() if n > 1)
  return f'{mesh or "data:1"} accum={report["accum"]} remat={report["remat"]}'
