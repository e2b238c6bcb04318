"""FLOPs of Pallas kernels, which a compiled module shows as opaque calls.

In: the jaxpr of a traced program. Out: name of a kernel -> FLOPs of one call:
matrix products of its body, times the cells of its grid. Of JAX's splash
attention, cells whose tile the mask hides do not count; they are skipped at run
time. Called by `compile.py`; `costs.py` finds the calls by name.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

_Values = dict[Any, np.ndarray]


def kernel_flops(closed: core.ClosedJaxpr) -> dict[str, float]:
  """FLOPs of one call of each kernel, by name.

  Kernels of one name and several sizes count as the largest of them.
  """
  found: dict[str, float] = {}
  consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
  for eqn, values in _calls(closed.jaxpr, _known(consts)):
    name = str(eqn.params['name'] or eqn.params.get('debug_info', ''))
    cells = math.prod(eqn.params['grid_mapping'].grid)
    flops = cells * _body_flops(eqn.params['jaxpr']) * _shown(eqn, values)
    found[name] = max(found.get(name, 0.0), flops)
  return found


def _known(values: Mapping[Any, Any]) -> _Values:
  """Integers alone: block masks are, and weights are large."""
  return {
    var: np.asarray(value)
    for var, value in values.items()
    if np.issubdtype(getattr(value, 'dtype', np.float32), np.integer)
  }


def _calls(jaxpr: Any, values: _Values) -> Iterator[tuple[Any, _Values]]:
  """Every call of a kernel, with the constants that are known there.

  `values` gains what inner programs hand out unchanged: the masks of the
  backward pass come as results of the forward pass.
  """
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'pallas_call':
      yield eqn, values
      continue
    for closed in eqn.params.values():
      yield from _inside(eqn, closed, values)


def _inside(
  eqn: Any, param: Any, values: _Values
) -> Iterator[tuple[Any, _Values]]:
  """Calls within one parameter of an equation: a program, or several."""
  if isinstance(param, tuple | list):
    for one in param:
      yield from _inside(eqn, one, values)
    return
  closed = isinstance(param, core.ClosedJaxpr)
  if not closed and not isinstance(param, core.Jaxpr):
    return
  inner = param.jaxpr if closed else param
  known: _Values = {}
  if closed:
    known = _known(dict(zip(inner.constvars, param.consts, strict=True)))
  if len(inner.invars) == len(eqn.invars):
    for var, given in zip(inner.invars, eqn.invars, strict=True):
      if isinstance(given, core.Var) and given in values:
        known[var] = values[given]
  yield from _calls(inner, known)
  if len(inner.outvars) == len(eqn.outvars):
    for var, result in zip(inner.outvars, eqn.outvars, strict=True):
      if isinstance(var, core.Var) and var in known:
        values[result] = known[var]


def _shown(eqn: Any, values: _Values) -> float:
  """Share of the tiles of splash attention that its mask does not hide."""
  if not str(eqn.params['name']).startswith('splash'):
    return 1.0
  # Of the operands, the second says of each tile whether its mask hides it (0),
  # hides it in part (1) or not at all (2).
  mask = values.get(eqn.invars[1])
  return 1.0 if mask is None else float(np.mean(mask != 0))


def _body_flops(jaxpr: Any) -> float:
  """Matrix products of a jaxpr; of branches, the largest."""
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (summed, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      size = math.prod(eqn.outvars[0].aval.shape)
      total += 2.0 * size * math.prod(shape[d] for d in summed)
    elif eqn.primitive.name == 'cond':
      total += max(_body_flops(b.jaxpr) for b in eqn.params['branches'])
    else:
      trips = eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else 1
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        total += trips * _body_flops(inner)
  return total
