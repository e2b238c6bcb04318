"""Checkpoints of a run: written asynchronously, judged before they are read.

In: a work directory and a train state. Out: step directories of four items:
`params` (the EMA if there is one: all that sampling needs), `train_state` (the
rest), `data` (loader position), `meta` (config, layout, fingerprints). What is
not a whole checkpoint is reported, ignored, and never deleted.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from scar_jax import distributed, paths
from scar_jax.config import differences
from scar_jax.train.state import TrainState
from scar_jax.train.whole import WholeSteps, scan, unwhole_reason
from scar_jax.types import PyTree

LAYOUT = 1  # of the items; a change of parameter paths raises it
# What a run may change between two starts; all else is another run.
_FREE = (
  *('mesh.', 'sample.', 'eval.', 'init_from'),
  *('data.path', 'data.workers', 'data.strict', 'data.max_bad_share'),
  *('optim.lr', 'optim.schedule', 'optim.warmup', 'optim.end_scale'),
  *('optim.weight_decay', 'train.steps', 'train.accum', 'train.log_every'),
  *('train.save_every', 'train.keep', 'train.best', 'train.picture_every'),
  *('train.max_bad_steps', 'train.resume', 'train.require_resume'),
  *('train.log_compiles', 'train.tpu_options'),
  *('tokenizer.artifact', 'encoder.artifact', 'text.artifact'),
)


class CheckpointError(ValueError):
  """No checkpoint can be read, or one could not be written."""


def _all_finite(tree: PyTree) -> jax.Array:
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x, jnp.floating)]
  return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def _handlers() -> dict[str, Any]:
  """How each item is written.

  Copies of an array are split among their devices to be written in parallel;
  below a MiB the slicing costs more than it saves (a compilation per shape).
  """
  arrays = ocp.type_handlers.create_type_handler_registry(
    (
      jax.Array,
      ocp.type_handlers.ArrayHandler(
        use_replica_parallel=True,
        min_slice_bytes_for_replica_parallel=2**20,
      ),
    )
  )
  return {
    'params': ocp.PyTreeCheckpointHandler(type_handler_registry=arrays),
    'train_state': ocp.PyTreeCheckpointHandler(type_handler_registry=arrays),
    'data': ocp.JsonCheckpointHandler(),
    'meta': ocp.JsonCheckpointHandler(),
  }


def _restore_args(abstract: PyTree) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(
    abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
  )


class Checkpoints:
  """Saves and restores the states of one run.

  Args:
    workdir: of the run, local or in a bucket; checkpoints lie in its folder
      `checkpoints`, which all processes must see.
    config: plain dict of the config.
    keep: newest checkpoints kept, besides the best.
    best: name of the metric whose lowest value is best.
    fingerprints: of the frozen artifacts, by name.
  """

  def __init__(
    self,
    workdir: paths.PathLike,
    config: Mapping[str, Any],
    keep: int = 2,
    best: str = 'loss',
    fingerprints: Mapping[str, str] | None = None,
  ):
    self.folder = paths.folder(workdir) / 'checkpoints'
    self._meta = {
      'layout': LAYOUT,
      'config': json.loads(json.dumps(config)),
      'artifacts': dict(fingerprints or {}),
    }
    # Its own: another run of this process is no reason to trace it again.
    self._finite = jax.jit(lambda tree: _all_finite(tree))
    self._best = best

    def metric(metrics: Mapping[str, float]) -> float:
      return metrics[best]

    policies = checkpoint_managers
    self._manager = ocp.CheckpointManager(
      self.folder,
      item_handlers=_handlers(),
      options=ocp.CheckpointManagerOptions(
        step_name_format=WholeSteps(),
        best_fn=metric,
        best_mode='min',
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(keep),
            policies.BestN(
              get_metric_fn=metric,
              reverse=True,
              n=1,
              keep_checkpoints_without_metrics=False,
            ),
          ]
        ),
        save_decision_policy=policies.FixedIntervalPolicy(1),
      ),
    )

  def save(
    self,
    state: TrainState,
    position: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts writing a checkpoint; `wait` or the next save report failure.

    Args:
      state: the state; it may be donated to the next step at once.
      position: JSON-able state of the data loader.
      metrics: for the choice of the best.

    Raises:
      CheckpointError: parameters are not finite (nothing is written), or this
        or the previous checkpoint could not be written.
    """
    step = int(state.step)
    weights = {'params': state.params, 'ema': state.ema}
    if not bool(self._finite(weights)):
      raise CheckpointError(
        f'step {step}: parameters are not finite; not saved. '
        f'The last good checkpoint stays: {self._last()}'
      )
    if metrics and self._best not in metrics:
      raise ValueError(
        f'train.best={self._best!r} is no metric of this run; accepted: '
        f'{", ".join(sorted(metrics))} (set --config.train.best)'
      )
    if metrics and not math.isfinite(metrics[self._best]):
      metrics = None
    self.wait()
    self._set_aside(step)
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.PyTreeSave(state.ema or state.params),
          train_state=ocp.args.PyTreeSave(_rest(state)),
          data=ocp.args.JsonSave(dict(position)),
          meta=ocp.args.JsonSave(self._meta),
        ),
        metrics=dict(metrics) if metrics else None,
        force=True,
      )
    except Exception as error:
      raise self._write_error(step, error) from error

  def wait(self) -> None:
    """Blocks until the last save is on disk.

    Raises:
      CheckpointError: it could not be written.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._write_error(None, error) from error

  def close(self) -> None:
    """Waits, then frees the manager's threads."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _last(self) -> str:
    steps, _ = scan(self.folder)
    return f'step {steps[-1]} in {self.folder}' if steps else 'none yet'

  def _write_error(self, step: int | None, error: Exception) -> CheckpointError:
    what = 'the last checkpoint' if step is None else f'checkpoint {step}'
    reason = str(error).strip().splitlines()
    return CheckpointError(
      f'{what} could not be written to {self.folder}: '
      f'{type(error).__name__}: {reason[0] if reason else ""}. '
      f'Free space there and start again; last good checkpoint: {self._last()}'
    )

  def _set_aside(self, step: int) -> None:
    """A stale entry under this step's name is renamed, not overwritten."""
    path = self.folder / str(step)
    if path.exists() and unwhole_reason(path) and jax.process_index() == 0:
      number = 0
      while (aside := path.with_name(f'{step}.stale-{number}')).exists():
        number += 1
      path.rename(aside)
      logging.warning('%s was not whole; renamed to %s', path, aside.name)

  def restore(
    self, abstract: TrainState, required: bool = False
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest whole state, placed as `abstract` says, and loader position.

    Args:
      abstract: shapes and shardings of today's mesh; that of the save is free.
      required: nothing to restore is an error.

    Raises:
      CheckpointError: none is whole although `required` asks for one, or the
        run had another config, layout or artifact.
    """
    steps, ignored = scan(self.folder)
    if jax.process_index() == 0:
      for line in ignored:
        logging.warning('%s', line)
    # A folder of a network may not look the same from every host.
    steps = distributed.word_of_first(steps[::-1])
    if not steps:
      if required:
        raise CheckpointError(
          f'no whole checkpoint in {self.folder} to resume from '
          f'({len(ignored)} entries ignored: {"; ".join(ignored) or "empty"}). '
          'Use another --workdir for a fresh start'
        )
      return None
    for step in steps:
      self._check_meta(step)
      found, cause, reason = None, None, 'another process could not read it'
      try:
        found = self._read(step, abstract)
      except Exception as error:
        cause, reason = error, str(error)
      if distributed.all_agree(found is not None):
        return found
      if step == steps[-1]:
        raise CheckpointError(
          f'checkpoint {step} in {self.folder} cannot be read: {reason}'
        ) from cause
      logging.warning(
        'ignored %d in %s: it cannot be read (%s)',
        *(step, self.folder, reason.splitlines()[:1]),
      )
    return None

  def refuse_existing(self) -> None:
    """A fresh start never writes among the checkpoints of another.

    Raises:
      CheckpointError: there are some.
    """
    steps, _ = scan(self.folder)
    if steps:
      raise CheckpointError(
        f'train.resume=False, but {self.folder} holds step {steps[-1]}; '
        'accepted: another --workdir, or --config.train.resume=True'
      )

  def _check_meta(self, step: int) -> None:
    meta = read_json(self.folder, step, 'meta')
    if meta['layout'] != LAYOUT:
      raise CheckpointError(
        f'checkpoint {step} in {self.folder} has layout {meta["layout"]}, '
        f'this version reads {LAYOUT}'
      )
    changed = config_changes(meta['config'], self._meta['config'])
    changed += differences(
      meta['artifacts'], self._meta['artifacts'], 'artifact.'
    )
    if changed:
      raise CheckpointError(
        f'{self.folder.parent} holds a run of another config: '
        f'{"; ".join(changed)}. Change these back, or use another --workdir'
      )

  def _read(
    self, step: int, abstract: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=_restore_args(abstract.params),
        train_state=_restore_args(_rest(abstract)),
        data=ocp.args.JsonRestore(),
      ),
    )
    rest = dict(found['train_state'])
    params, ema = found['params'], {}
    if abstract.ema:
      params, ema = rest.pop('params'), params
    return TrainState(params=params, ema=ema, **rest), found['data']


def _rest(state: TrainState) -> dict[str, Any]:
  """What item `params` does not hold."""
  names = ('step', 'opt_state', 'extra', 'seed', 'skipped', 'bad_in_row')
  rest = {name: getattr(state, name) for name in names}
  return rest | ({'params': state.params} if state.ema else {})


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """The differing fields that make it another run."""
  return [d for d in differences(old, new) if not d.startswith(_FREE)]


def read_json(folder: epath.Path, step: int, item: str) -> dict[str, Any]:
  """A JSON item of one step, read without the arrays beside it."""
  return json.loads((folder / str(step) / item / 'metadata').read_text())


def abstract_with(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Shapes with the placement that a restore must produce."""
  return jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
    shapes,
    shardings,
  )


def newest_params(
  workdir: paths.PathLike, abstract: PyTree
) -> tuple[int, PyTree]:
  """`(step, params)` of the newest whole checkpoint of a run, to sample from.

  Args:
    workdir: of the run.
    abstract: shapes and shardings.

  Raises:
    CheckpointError: there is none.
  """
  folder = paths.folder(workdir) / 'checkpoints'
  steps, _ = scan(folder)
  if not steps:
    raise CheckpointError(f'no whole checkpoint in {folder}')
  with ocp.StandardCheckpointer() as reader:
    path = folder / str(steps[-1]) / 'params'
    return steps[-1], reader.restore(path, abstract)
