"""What the one trainer asks of a task, and how a task is found by name.

A task says what is trained: how variables are made, the loss of a batch, and
what is exported at the end. The trainer (`train/loop.py`) owns everything
else: devices, optimiser, EMA, checkpoints, logging.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jaxtyping import Float

from scar_jax.types import Array, Batch, PyTree

TASKS = ('tokenizer', 'encoder', 'scar')


class Task(Protocol):
  """One recipe: pure functions over explicit state, built once per run.

  A module `train/tasks/<name>.py` holds two public names:

  * `SECTIONS: dict[str, type]`, the frozen dataclasses of the config sections
    that only this task has (at least `model` and `loss`);
  * `make_task(config, artifacts) -> Task`, where `artifacts` maps 'tokenizer',
    'encoder', 'text' to loaded `artifacts.Artifact`s, those that config names.

  Attributes:
    name: one of `TASKS`.
    frozen: name -> parameters of networks that are never trained. The trainer
      passes them to the compiled step as an argument.
  """

  name: str
  frozen: Mapping[str, PyTree]

  def init(self, rng: Array, batch: Batch) -> dict[str, PyTree]:
    """Fresh variables: 'params' and any further collections.

    Runs under `eval_shape` and `jit`; parameters may still be boxed with their
    logical axes.
    """
    ...

  def loss(
    self,
    params: PyTree,
    extra: PyTree,
    frozen: Mapping[str, PyTree],
    batch: Batch,
    rng: Array,
    train: bool,
  ) -> tuple[Float[Array, ''], tuple[dict[str, Float[Array, '']], PyTree]]:
    """Loss of one batch, `(loss, (metrics, new extra))`, all float32.

    Args:
      params: trained parameters, unboxed.
      extra: the other collections of `init` (usage counts, statistics).
      frozen: see the class.
      batch: see `scar_jax.types.Batch`.
      rng: key of this step and microbatch.
      train: False switches dropout off and must leave `extra` unchanged.
    """
    ...

  def artifact(self, params: PyTree, extra: PyTree) -> tuple[str, Any, PyTree]:
    """`(kind, config dataclass, parameters)` of what others will load."""
    ...


# Optional members, looked up by name (`optional`):
#   labels(params) -> PyTree of str: optimiser group of each parameter; 'main'
#     is the default group, 'frozen' is never updated.
#   post_update(params, extra, rng, step) -> (params, extra): runs in the
#     compiled step after the optimiser (dead codes).
#   pictures(params, extra, frozen, batch, rng) -> {name: uint8 [n, H, W, 3]}.
#   flops(batch) -> {part: FLOPs}: what a step of so many images must spend.
#   exempt: path prefixes of parameters that may stay replicated.
#   as_trained(params) -> params: of an artifact, in the layout of `init`.
#   new: path prefixes of parameters that a model named by `init_from` may lack.
#   tokens: target tokens of an image, for rates.
def optional(task: Task, name: str) -> Any:
  """An optional member of a task, or None."""
  return getattr(task, name, None)


def task_module(name: str) -> Any:
  """The module of a task, imported on first use.

  Raises:
    ValueError: no such task.
  """
  if name not in TASKS:
    raise ValueError(
      f'task={name!r} is unknown; accepted: {", ".join(TASKS)} '
      '(set `task` in the config file)'
    )
  return importlib.import_module(f'{__name__}.{name}')


def make_task(config: Any, artifacts: Mapping[str, Any] | None = None) -> Task:
  """Builds the task that `config.task` names."""
  return task_module(config.task).make_task(config, artifacts or {})


def abstract(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a batch, for `eval_shape`."""
  return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
