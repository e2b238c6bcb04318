"""What the log says about a model before its first step.

In: shapes, placement, the compiled step. Out: log lines: parameters by module
with their sharding, and the memory that the compiled step needs.
"""

import collections

import jax
import numpy as np
from absl import logging

from scar_jax.sharding import path_name
from scar_jax.types import PyTree

_MIB = 2**20


def describe_parameters(params: PyTree, shardings: PyTree) -> None:
  """Logs sizes by module, and every parameter with its spec at -v 1."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  modules: collections.Counter[str] = collections.Counter()
  for (path, leaf), place in zip(
    leaves, jax.tree.leaves(shardings), strict=True
  ):
    name = path_name(path)
    modules[name.split('/')[0]] += leaf.size
    logging.vlog(1, '%s %s %s', name, leaf.shape, place.spec)
  total = sum(modules.values())
  parts = ', '.join(f'{k} {n:,}' for k, n in modules.most_common())
  logging.info(
    'parameters: %s (%.1f MiB float32): %s',
    *(f'{total:,}', total * np.dtype('float32').itemsize / _MIB, parts),
  )


def describe_memory(compiled: jax.stages.Compiled) -> None:
  """Logs bytes per device of the compiled step, and its FLOPs."""
  memory = compiled.memory_analysis()
  if memory is not None:
    logging.info(
      'compiled step, per device: arguments %.1f MiB (donated %.1f), '
      'temporaries %.1f, outputs %.1f',
      memory.argument_size_in_bytes / _MIB,
      memory.alias_size_in_bytes / _MIB,
      memory.temp_size_in_bytes / _MIB,
      memory.output_size_in_bytes / _MIB,
    )
  cost = compiled.cost_analysis() or {}
  if cost.get('flops', 0) > 0:
    logging.info('compiled step: %.2f GFLOP', cost['flops'] / 1e9)
