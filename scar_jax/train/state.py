"""The train state: all that changes during a run, born sharded.

In: a task, an optimiser and the shapes of a batch. Out: a `TrainState` whose
arrays are made by one compiled function directly in their final placement, so
that no device ever holds a whole copy of what is to be split.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Int, UInt32

from scar_jax import sharding
from scar_jax.train.tasks import Task
from scar_jax.types import Array, PyTree


@flax.struct.dataclass
class TrainState:
  """Everything that a step reads and writes.

  Attributes:
    step: optimiser steps tried, the skipped ones included.
    params: float32 master weights, unboxed.
    opt_state: of optax.
    ema: float32 average of params, or {} when off.
    extra: further collections of the task.
    seed: of the run; the key of step n is `fold_in(key(seed), n)`.
    skipped: steps whose update was thrown away, over the whole run.
    bad_in_row: the same, since the last good step.
  """

  step: Int[Array, '']
  params: PyTree
  opt_state: PyTree
  ema: PyTree
  extra: PyTree
  seed: UInt32[Array, '']
  skipped: Int[Array, '']
  bad_in_row: Int[Array, '']


def abstract_variables(task: Task, batch: PyTree) -> dict[str, PyTree]:
  """Boxed shapes of the task's variables.

  Args:
    task: the task.
    batch: abstract batch.

  Raises:
    ValueError: a floating parameter is not float32. Small updates vanish when
      they are added to narrower master weights.
  """
  boxed = jax.eval_shape(
    lambda seed: task.init(jax.random.key(seed), _zeros(batch)),
    jax.ShapeDtypeStruct((), jnp.uint32),
  )
  flat = jax.tree_util.tree_flatten_with_path(sharding.unbox(boxed['params']))
  for path, leaf in flat[0]:
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
      raise ValueError(
        f'parameter {sharding.path_name(path)} is {leaf.dtype}; master weights '
        'must be float32 (set the compute type with --config.model.dtype)'
      )
  return boxed


def _zeros(batch: PyTree) -> PyTree:
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), batch)


def make_init(
  task: Task, tx: optax.GradientTransformation, batch: PyTree, ema: bool
) -> Callable[[UInt32[Array, '']], TrainState]:
  """`seed -> TrainState`, to be compiled with output shardings."""

  def init(seed: UInt32[Array, '']) -> TrainState:
    variables = dict(task.init(jax.random.key(seed), _zeros(batch)))
    params = sharding.unbox(variables.pop('params'))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
      step=zero,
      params=params,
      opt_state=tx.init(params),
      ema=jax.tree.map(jnp.copy, params) if ema else {},
      extra=sharding.unbox(variables),
      seed=seed,
      skipped=zero,
      bad_in_row=zero,
    )

  return init


def state_shardings(
  abstract: TrainState, boxed: dict[str, PyTree], mesh: Mesh
) -> TrainState:
  """A NamedSharding for each leaf of the state.

  Args:
    abstract: shapes of the state.
    boxed: see `abstract_variables`.
    mesh: the mesh.
  """
  boxed = dict(boxed)
  params = sharding.tree_shardings(boxed.pop('params'), mesh)
  whole = sharding.replicated(mesh)
  return TrainState(
    step=whole,
    params=params,
    opt_state=sharding.shardings_like(
      abstract.opt_state, abstract.params, params
    ),
    ema=params if abstract.ema else {},
    extra=sharding.tree_shardings(boxed, mesh),
    seed=whole,
    skipped=whole,
    bad_in_row=whole,
  )


def abstract_state(
  init: Callable[[UInt32[Array, '']], TrainState],
) -> TrainState:
  """Shapes of the state that `init` makes."""
  return jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.uint32))


def create(
  init: Callable[[UInt32[Array, '']], TrainState],
  shardings: TrainState,
  seed: int,
) -> TrainState:
  """The fresh state, each array made where it stays."""
  # It runs once: on a CPU, optimising it costs more than it saves.
  once = {'xla_backend_optimization_level': 0}
  options = once if jax.default_backend() == 'cpu' else None
  made: Any = jax.jit(init, out_shardings=shardings, compiler_options=options)
  return made(jnp.uint32(seed))
