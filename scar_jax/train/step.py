"""One optimiser step: a pure function, compiled once, its state donated.

In: state, frozen networks, a global batch. Out: the next state and float32
scalars. A step whose loss or gradient norm is not finite changes nothing but
its counters: parameters, moments, EMA and statistics keep their bits.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float

from scar_jax import compiler
from scar_jax.config import OptimConfig
from scar_jax.sharding import platform
from scar_jax.train.optim import learning_rate
from scar_jax.train.state import TrainState
from scar_jax.train.tasks import Task, optional
from scar_jax.types import Array, Batch, PyTree

Metrics = dict[str, Float[Array, '']]
Step = Callable[
  [TrainState, Mapping[str, PyTree], Batch], tuple[TrainState, Metrics]
]


def make_step(
  task: Task,
  tx: optax.GradientTransformation,
  optim: OptimConfig,
  steps: int,
  accum: int = 1,
  ema: float = 0.0,
) -> Step:
  """The step function of a run, not yet compiled.

  Args:
    task: gives loss and `post_update`.
    tx: the optimiser.
    optim: for the learning rate that is reported.
    steps: of the run.
    accum: microbatches; their gradients and metrics are averaged.
    ema: decay of the parameter average; 0 is off.
  """
  rate = learning_rate(optim, steps)
  post_update = optional(task, 'post_update')

  def micro_grads(
    params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch, rng: Array
  ) -> tuple[Metrics, PyTree, PyTree]:
    def loss_fn(p: PyTree) -> tuple[Array, tuple[Metrics, PyTree]]:
      return task.loss(p, extra, frozen, batch, rng, True)

    (loss, (metrics, extra)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params
    )
    return {**metrics, 'loss': loss}, grads, extra

  def all_grads(
    state: TrainState, frozen: PyTree, batch: Batch, rng: Array
  ) -> tuple[Metrics, PyTree, PyTree]:
    if accum == 1:
      return micro_grads(state.params, state.extra, frozen, batch, rng)

    def body(carry: PyTree, inputs: PyTree) -> tuple[PyTree, Metrics]:
      total, extra = carry
      micro, key = inputs
      metrics, grads, extra = micro_grads(
        state.params, extra, frozen, micro, key
      )
      return (jax.tree.map(jnp.add, total, grads), extra), metrics

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (total, extra), metrics = jax.lax.scan(
      body,
      (zeros, state.extra),
      (_microbatches(batch, accum), jax.random.split(rng, accum)),
    )
    metrics = jax.tree.map(jnp.mean, metrics)
    return metrics, jax.tree.map(lambda g: g / accum, total), extra

  def train_step(
    state: TrainState, frozen: Mapping[str, PyTree], batch: Batch
  ) -> tuple[TrainState, Metrics]:
    rng = jax.random.fold_in(jax.random.key(state.seed), state.step)
    loss_rng, post_rng = jax.random.split(rng)
    metrics, grads, extra = all_grads(state, frozen, batch, loss_rng)
    norm = optax.tree.norm(grads)
    # The loss can be finite while the gradient is not (sqrt at 0).
    good = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)

    def update() -> tuple[PyTree, ...]:
      updates, opt_state = optax.with_extra_args_support(tx).update(
        grads, state.opt_state, state.params, norm=norm
      )
      params, kept = optax.apply_updates(state.params, updates), extra
      if post_update is not None:
        params, kept = post_update(params, kept, post_rng, state.step)
      average = jax.tree.map(
        lambda e, p: ema * e + (1 - ema) * p, state.ema, params if ema else {}
      )
      return params, opt_state, average, kept

    old = (state.params, state.opt_state, state.ema, state.extra)
    params, opt_state, average, extra = _guarded(good, update, old)
    bad = (~good).astype(jnp.int32)
    state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      ema=average,
      extra=extra,
      skipped=state.skipped + bad,
      bad_in_row=(state.bad_in_row + 1) * bad,
    )
    metrics |= {
      'grad_norm': norm,
      'lr': rate(state.step - 1),
      'skipped': state.skipped.astype(jnp.float32),
      'bad_in_row': state.bad_in_row.astype(jnp.float32),
    }
    return state, metrics

  return train_step


def _guarded(
  good: Bool[Array, ''], update: Callable[[], PyTree], old: PyTree
) -> PyTree:
  """The result of `update` if the step is good, else the old state's bits.

  TPUs fuse a choice between arrays into the update, where a branch costs them
  copies (8 % more traffic of HBM, `scar plan` of size B on v5e:2x2). On CPUs
  the choice is another pass over all of the state, and a branch is not.
  """
  if platform() == 'cpu':
    return jax.lax.cond(good, update, lambda: old)
  return jax.tree.map(lambda n, o: jnp.where(good, n, o), update(), old)


def _microbatches(batch: Batch, accum: int) -> Batch:
  """[B, ...] -> [accum, B / accum, ...].

  Row i goes to microbatch i % accum, so that no row leaves its device.
  """

  def split(x: Array) -> Array:
    rows = x.reshape(x.shape[0] // accum, accum, *x.shape[1:])
    return jnp.swapaxes(rows, 0, 1)

  return jax.tree.map(split, dict(batch))


class Steps:
  """The compiled steps of a run, one for each shape of batch.

  Attributes:
    compiled: `shapes_of` a batch -> step.
  """

  def __init__(self):
    self.compiled: dict[Any, jax.stages.Compiled] = {}

  def add(self, batch: PyTree, step: jax.stages.Compiled) -> None:
    """A step for batches of these shapes."""
    self.compiled[shapes_of(batch)] = step

  def __call__(
    self, state: TrainState, frozen: Mapping[str, PyTree], batch: Batch
  ) -> tuple[TrainState, Metrics]:
    """One step.

    Raises:
      TypeError: no step was compiled for a batch of these shapes.
    """
    step = self.compiled.get(shapes_of(batch))
    if step is None:  # whichever: it says what it was compiled for
      step = next(iter(self.compiled.values()))
    return step(state, frozen, batch)


def shapes_of(batch: Batch) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """Name and shape of every column."""
  return tuple((name, x.shape) for name, x in sorted(batch.items()))


def trace_step(
  step: Step,
  state: PyTree,
  frozen: PyTree,
  batch: PyTree,
  shardings: PyTree,
) -> jax.stages.Traced:
  """The step traced for the placed shapes of a run; see `compile_step`."""
  program = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
  return program.trace(state, frozen, batch)


def compile_step(
  step: Step,
  state: PyTree,
  frozen: PyTree,
  batch: PyTree,
  shardings: PyTree,
  options: Iterable[tuple[str, str]] = (),
) -> jax.stages.Compiled:
  """Compiles the step once for the placed shapes of a run.

  Args:
    step: see `make_step`.
    state: abstract or real state.
    frozen: placed frozen networks.
    batch: abstract batch, with shardings.
    shardings: of the state; metrics come back replicated.
    options: of the compiler, on TPUs; CPUs have those of `compiler.py`.
  """
  lowered = trace_step(step, state, frozen, batch, shardings).lower()
  return compile_with(lowered, options, compiler.options(platform()))


def compile_with(
  lowered: jax.stages.Lowered,
  options: Iterable[tuple[str, str]],
  more: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
  """Compiles with options of XLA, which only TPUs get.

  Args:
    lowered: the program.
    options: `train.tpu_options`: names and values, in text that XLA reads.
    more: options for all devices.

  Raises:
    ValueError: XLA does not know an option, or cannot read its value.
  """
  chosen: dict[str, Any] = dict(options) if platform() == 'tpu' else {}
  try:
    return lowered.compile(chosen | dict(more or {}))
  except jax.errors.JaxRuntimeError as error:
    if not re.search('No such compile option|Failed to parse', str(error)):
      raise
    raise ValueError(
      f'train.tpu_options={dict(options)}: {error}; accepted: options of the '
      'installed libtpu (set --config.train.tpu_options)'
    ) from error
