"""From a task and the shapes of a batch to all that a compiled step needs.

In: a checked config, a task, an abstract batch, the mesh. Out: an `Assembly`:
optimiser, shapes and placement of the state, the step. Nothing is allocated.
Called by `train/loop.py`, which then makes the state, and by `scar plan`, which
only compiles.
"""

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from scar_jax import sharding
from scar_jax.config import Config
from scar_jax.train import state as state_lib
from scar_jax.train.optim import make_optimizer
from scar_jax.train.state import TrainState
from scar_jax.train.step import Step, make_step
from scar_jax.train.tasks import Task, optional
from scar_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Assembly:
  """A run before its first array.

  Attributes:
    init: `seed -> TrainState`, to be compiled with `places`.
    shapes: of the state.
    places: a NamedSharding for each of its leaves.
    step: not yet compiled.
  """

  init: Callable[..., TrainState]
  shapes: TrainState
  places: TrainState
  step: Step


def assemble(config: Config, task: Task, batch: PyTree, mesh: Mesh) -> Assembly:
  """Shapes, placement and step of a run.

  Args:
    config: checked.
    task: what is trained.
    batch: abstract, global, with shardings.
    mesh: the mesh.

  Raises:
    ValueError: an optimiser setting that matches no parameter, or a large
      parameter that the mesh leaves whole on each device.
  """
  boxed = state_lib.abstract_variables(task, batch)
  labels = optional(task, 'labels')
  tx = make_optimizer(
    config.optim,
    config.train.steps,
    boxed['params'],
    labels(sharding.unbox(boxed['params'])) if labels else None,
  )
  init = state_lib.make_init(task, tx, batch, config.train.ema > 0)
  shapes = state_lib.abstract_state(init)
  places = state_lib.state_shardings(shapes, boxed, mesh)
  exempt = optional(task, 'exempt') or ()
  sharding.check_coverage(shapes.params, places.params, mesh, exempt)
  step = make_step(
    task,
    tx,
    config.optim,
    config.train.steps,
    config.train.accum,
    config.train.ema,
  )
  return Assembly(init, shapes, places, step)
