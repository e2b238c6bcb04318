"""What became of every tensor of a checkpoint.

In: findings of `common.assemble`, and what a command line allows. Out: counts,
lists, and one error that names all that does not fit. `recording` makes a
report the current one, so that the converters of all families need not hand it
on; outside of it everything is strict and nobody reads the report.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

_SHOWN = 30  # names of one kind in an error; the report keeps all


@dataclasses.dataclass
class Report:
  """Findings, each with names; shapes are torch's.

  Attributes:
    allow_missing: parameters without a tensor are drawn, not refused.
    allow_unexpected: tensors without a parameter are left out, not refused.
    lazy: parameters become `streaming.Lazy`, judged now and read again later.
    notes: what was decided on the way: prefixes, containers, sizes.
    used: tensors that became parameters.
    skipped: name -> shape of tensors that are left out on purpose.
    missing: name -> wanted shape.
    unexpected: name -> shape.
    wrong: sentences with both shapes.
    not_finite: tensors that hold NaN or infinity.
    drawn: parameters that are random because of `allow_missing`.
  """

  allow_missing: bool = False
  allow_unexpected: bool = False
  lazy: bool = False
  notes: list[str] = dataclasses.field(default_factory=list)
  used: dict[str, None] = dataclasses.field(default_factory=dict)
  skipped: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  missing: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  unexpected: dict[str, tuple[int, ...]] = dataclasses.field(
    default_factory=dict
  )
  wrong: list[str] = dataclasses.field(default_factory=list)
  not_finite: list[str] = dataclasses.field(default_factory=list)
  drawn: list[str] = dataclasses.field(default_factory=list)

  def refuse(self) -> None:
    """Raises for what is not allowed.

    Raises:
      ValueError: lists missing, unexpected, wrongly shaped and not finite
        tensors in one message.
    """
    missing = {} if self.allow_missing else self.missing
    unexpected = {} if self.allow_unexpected else self.unexpected
    if not (missing or unexpected or self.wrong or self.not_finite):
      return
    parts = [
      f'{len(missing)} tensors missing: {_names(missing)}',
      f'{len(unexpected)} unexpected: {_names(unexpected)}',
      f'{len(self.wrong)} of wrong shape: {_names(self.wrong)}',
    ]
    if self.not_finite:
      parts.append(
        f'{len(self.not_finite)} with NaN or infinity: '
        f'{_names(self.not_finite)}'
      )
    for label, shapes in (('wanted', missing), ('found', unexpected)):
      if shapes:
        some = list(shapes.items())[:_SHOWN]
        parts.append(f'{label} ' + ', '.join(f'{k} {s}' for k, s in some))
    raise ValueError(
      '; '.join(parts) + '; accepted: the tensors of this model and size '
      '(set --config.model, or give another file; scar convert has '
      '--allow_missing and --allow_unexpected)'
    )

  def counts(self) -> dict[str, int]:
    """Tensors of each kind."""
    kinds = ('used', 'skipped', 'missing', 'unexpected', 'wrong', 'not_finite')
    return {kind: len(getattr(self, kind)) for kind in kinds}

  def lines(self) -> list[str]:
    """The report for people: notes, counts, and what was left out or drawn."""
    counts = ', '.join(f'{n} {kind}' for kind, n in self.counts().items())
    lines = [*self.notes, f'tensors: {counts.replace("_", " ")}']
    for kind in ('skipped', 'unexpected', 'missing'):
      for name, shape in getattr(self, kind).items():
        lines.append(f'  {kind} {name} {shape}')
    lines += [f'  drawn at random: {path}' for path in self.drawn]
    return lines

  def as_dict(self) -> dict[str, Any]:
    """Everything, JSON-able; of the used tensors the number only."""
    return dataclasses.asdict(self) | {'used': len(self.used)}


def _names(names: Sequence[str] | dict[str, Any]) -> str:
  more = len(names) - _SHOWN
  return f'{list(names)[:_SHOWN]}' + (f' and {more} more' if more > 0 else '')


_ACTIVE: contextvars.ContextVar[Report | None] = contextvars.ContextVar(
  'conversion_report', default=None
)


@contextlib.contextmanager
def recording(report: Report) -> Iterator[Report]:
  """Makes `report` the one that conversions inside the block write to."""
  token = _ACTIVE.set(report)
  try:
    yield report
  finally:
    _ACTIVE.reset(token)


def current() -> Report:
  """The report of the surrounding `recording`, or a fresh strict one."""
  return _ACTIVE.get() or Report()
