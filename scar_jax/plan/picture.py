"""A plan as a picture: bars of memory and of time.

In: the dict of `report.py`. Out: a PNG file. matplotlib comes with the extra
`plan`.
"""

import os
from collections.abc import Mapping
from typing import Any

from scar_jax.extras import require
from scar_jax.plan.chips import GIB
from scar_jax.plan.report import verdict

_COLOURS = ('#4477aa', '#66ccee', '#228833', '#ccbb44', '#ee6677', '#aa3377')
_EDGE = '#333333'


def draw(report: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Writes the picture.

  Raises:
    ValueError: matplotlib is not installed.
  """
  require('matplotlib', 'plan')
  from matplotlib.figure import Figure

  timed = 'binds' in report
  figure = Figure(figsize=(9, 4.6 if timed else 2.6), layout='constrained')
  axes = figure.subplots(2 if timed else 1, 1, squeeze=False)[:, 0]
  _memory(axes[0], report)
  if timed:
    _time(axes[1], report)
  mesh = ' '.join(f'{a}:{n}' for a, n in report['mesh'].items() if n > 1)
  figure.suptitle(
    f'{report["program"]} on {report["topology"]}, mesh {mesh or "data:1"}, '
    f'batch {report["batch"]}, {report["params"] / 1e6:,.0f} M parameters'
  )
  figure.savefig(path, dpi=150)


def _memory(axis: Any, report: Mapping[str, Any]) -> None:
  left = 0.0
  for colour, (name, size) in zip(
    _COLOURS, report['memory'].items(), strict=False
  ):
    size /= GIB
    label = f'{name} {size:.2f}'
    axis.barh(0, size, left=left, color=colour, label=label, height=0.5)
    left += size
  limit = report['hbm_limit_bytes'] / GIB
  axis.axvline(limit, color=_EDGE, linestyle='--')
  axis.set_xlim(0, 1.08 * max(left, limit))
  axis.set_yticks([])
  axis.set_xlabel('GiB per chip; the dashed line is what a chip has')
  axis.set_title(verdict(report), fontsize='medium', loc='left')
  _legend(axis)


def _time(axis: Any, report: Mapping[str, Any]) -> None:
  names = ('compute', 'hbm', 'interconnect', 'step')
  labels = ('compute', 'HBM', 'interconnect', 'step, at best')
  keys = [f'{name}_seconds' for name in names[:3]] + ['step_seconds_roofline']
  values = [1e3 * report[key] for key in keys]
  colours = [_COLOURS[i] for i in (0, 2, 3, 4)]
  bars = axis.barh(labels, values, color=colours, height=0.6)
  axis.bar_label(bars, fmt='%.1f', padding=3)
  axis.invert_yaxis()
  axis.set_xlim(0, 1.12 * max(values))
  axis.set_xlabel('milliseconds')
  axis.set_title(
    f'{report["binds"]} binds; {report["images_per_second"]:,.1f} images/s, '
    f'MFU at most {report["mfu_bound"]:.0%}',
    fontsize='medium',
    loc='left',
  )


def _legend(axis: Any) -> None:
  axis.legend(
    loc='upper center', bbox_to_anchor=(0.5, -0.32), ncols=3, frameon=False,
    fontsize='small',
  )  # fmt: skip
