"""FLOPs of instructions: matrix products, convolutions, and what holds them.

In: an instruction of `hlo.py` and where it stands. Out: FLOPs, 2 for each
multiply-add. TPU compilers write matrix products as convolutions, with batch
dimensions hidden in strides and dilation; so positions that meet padding or
holes do not count, as in XLA's own analysis. Called by `costs.py`.
"""

import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from scar_jax.plan.hlo import Computation, Instruction, Module


def instruction_flops(
  i: Instruction,
  inside: Computation,
  module: Module,
  kernels: Mapping[str, float],
) -> float:
  """FLOPs of one run of an instruction.

  Args:
    i: the instruction.
    inside: its computation.
    module: for fused computations.
    kernels: what the names of custom calls begin with -> FLOPs of one call.
  """
  if i.opcode == 'dot':
    return _dot(i, inside)
  if i.opcode == 'convolution':
    return _convolution(i, inside)
  if i.opcode == 'custom-call':
    named = (f for name, f in kernels.items() if i.name.startswith(name))
    return max(named, default=0.0)
  if i.opcode != 'fusion':
    return 0.0
  total = 0.0
  for name in i.called('calls'):
    fused = module.computations.get(name, Computation())
    for inner in fused.values():
      total += instruction_flops(inner, fused, module, kernels)
  return total


def _dot(i: Instruction, inside: Computation) -> float:
  left = inside[i.operands[0]].shapes[0]
  dims = re.findall(r'\d+', i.attribute('lhs_contracting_dims'))
  summed = math.prod(left.dims[int(d)] for d in dims)
  return 2.0 * i.shapes[0].size * summed


def _convolution(i: Instruction, inside: Computation) -> float:
  left, right = (inside[name].shapes[0] for name in i.operands[:2])
  out = i.shapes[0]
  lhs, rhs, result = re.split(r'_|->', i.attribute('dim_labels'))
  window = dict(re.findall(r'(\w+)=([\dx_\-]+)', i.attribute('window')))
  spatial = sorted(letter for letter in result if letter.isdigit())
  positions = 1
  for n, letter in enumerate(spatial):
    positions *= _met(
      left.dims[lhs.index(letter)],
      right.dims[rhs.index(letter)],
      out.dims[result.index(letter)],
      _nth(window.get('stride'), n, 1),
      _nth(window.get('pad'), n, 0),
      _nth(window.get('lhs_dilate'), n, 1),
      _nth(window.get('rhs_dilate'), n, 1),
    )
  groups = int(i.attribute('feature_group_count') or 1)
  batches = int(i.attribute('batch_group_count') or 1)
  inputs = left.dims[lhs.index('f')] // groups
  batch = left.dims[lhs.index('b')] // batches
  outputs = out.dims[result.index('f')]
  return 2.0 * positions * inputs * batch * outputs


def _nth(text: str | None, n: int, default: int) -> int:
  """Number n of `1x2`; of paddings `1_1x0_1`, what stands before."""
  if not text:
    return default
  return int(text.split('x')[n].split('_')[0])


@functools.lru_cache(maxsize=4096)
def _met(
  size: int,
  window: int,
  out: int,
  stride: int,
  pad: int,
  dilate: int,
  window_dilate: int,
) -> int:
  """Pairs of output place and tap that meet a real input, along one axis."""
  last = (size - 1) * dilate
  taps = np.arange(window) * window_dilate - pad
  total = 0
  for start in range(0, out, 1024):  # bounded memory
    places = np.arange(start, min(start + 1024, out))[:, None] * stride + taps
    real = (places >= 0) & (places <= last) & (places % dilate == 0)
    total += int(real.sum())
  return total
