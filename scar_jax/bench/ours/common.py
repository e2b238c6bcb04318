"""What our works share: converted weights, a training step, comparisons.

In: weights and inputs of a reference, as arrays. Out: an `Ours`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax import compiler
from scar_jax.bench.theirs.common import Optimizer, Setting
from scar_jax.config import OptimConfig
from scar_jax.models.scar_config import ScarConfig
from scar_jax.train.optim import make_optimizer
from scar_jax.train.state import TrainState, abstract_variables
from scar_jax.train.step import make_step
from scar_jax.train.tasks import abstract
from scar_jax.types import PyTree

_STEPS = 1000  # of the run that a step is said to be of; the rate is constant


@dataclasses.dataclass(frozen=True)
class Ours:
  """One work with our code.

  Attributes:
    call: does it once; its result is waited for.
    differ: given the reference's outputs, the largest absolute difference of
      ours and what they are; None where dropout makes them differ.
  """

  call: Callable[[], Any]
  differ: Callable[[Mapping[str, np.ndarray]], tuple[float | None, str]]


def on_device(params: PyTree) -> PyTree:
  """Converted parameters in memory that a step may overwrite."""
  return jax.tree.map(jnp.array, params)


def gap(ours: Any, theirs: Any) -> float:
  """Largest absolute difference.

  Raises:
    ValueError: other shapes.
  """
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  if ours.shape != theirs.shape:
    raise ValueError(f'outputs of shapes {ours.shape} and {theirs.shape}')
  return float(np.max(np.abs(ours.astype(np.float64) - theirs)))


def same(ours: Any, theirs: Any, what: str) -> str:
  """'255 of 256 codes equal'."""
  equal = np.asarray(ours) == np.asarray(theirs)
  return f'{int(equal.sum())} of {equal.size} {what} equal'


def to_train(model: ScarConfig, setting: Setting) -> ScarConfig:
  """What is trained: without dropout of any kind unless that was asked for.

  Layers are written out, as in the recipes for CPUs: a loop copies what it
  keeps for the backward pass, and starts every gradient from zeros.
  """
  decoder = dataclasses.replace(model.decoder, scan=False)
  if setting.dropout:
    return dataclasses.replace(model, decoder=decoder)
  # Without it, two steps can be the same.
  decoder = dataclasses.replace(
    decoder, resid_dropout=0.0, ffn_dropout=0.0, drop_path=0.0
  )
  return dataclasses.replace(
    model, decoder=decoder, token_dropout=0.0, text_dropout=0.0
  )


def training(
  task: Any, params: PyTree, batch: Mapping[str, np.ndarray], setting: Setting
) -> Ours:
  """One training step after the other.

  Args:
    task: a `train.tasks.Task`.
    params: converted weights; they are overwritten.
    batch: of `task`.
    setting: see there.
  """
  given = {k: jnp.asarray(v) for k, v in batch.items()}
  step = _Steps(task, params, given, setting.optimizer)

  def differ(theirs: Mapping[str, np.ndarray]) -> tuple[float | None, str]:
    losses = [float(step()) for _ in theirs['losses']]
    if setting.dropout:
      return None, 'nothing, for dropout'
    return gap(losses, theirs['losses']), f'loss of {len(losses)} steps'

  return Ours(step, differ)


class _Steps:
  """The trainer's own step, without its loop."""

  def __init__(
    self, task: Any, params: PyTree, batch: dict[str, Any], by: Optimizer
  ):
    optim = OptimConfig(**dataclasses.asdict(by))
    boxed = abstract_variables(task, abstract(batch))
    params = task.as_trained(params)
    tx = make_optimizer(optim, _STEPS, boxed['params'])
    self._batch, self._frozen = batch, dict(task.frozen)
    self._step = jax.jit(
      make_step(task, tx, optim, _STEPS),
      donate_argnums=0,
      compiler_options=compiler.options(),
    )
    make: Any = TrainState
    self._state = make(
      step=jnp.int32(0),
      params=params,
      opt_state=jax.jit(tx.init)(params),
      ema={},
      extra={},
      seed=jnp.uint32(0),
      skipped=jnp.int32(0),
      bad_in_row=jnp.int32(0),
    )

  def __call__(self) -> Any:
    self._state, metrics = self._step(self._state, self._frozen, self._batch)
    # The loss is there before the update is.
    jax.block_until_ready(self._state)
    return metrics['loss']
