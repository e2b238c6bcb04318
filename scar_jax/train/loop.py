"""The training program, top to bottom; called by `scar train`.

In: a checked config and a work directory. Out, in that directory: checkpoints,
`metrics.jsonl`, pictures, `summary.json` and at the end `artifact/`. The task
says what is trained; tokenizer, encoder and SCAR share every line here.
"""

import collections
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from scar_jax import artifacts, compiler, distributed, paths, sharding
from scar_jax import config as config_lib
from scar_jax.config import Config
from scar_jax.train import inputs, metrics
from scar_jax.train import state as state_lib
from scar_jax.train.assemble import assemble
from scar_jax.train.checkpoints import Checkpoints, abstract_with
from scar_jax.train.compilations import Compilations
from scar_jax.train.profile import Profiler, Window
from scar_jax.train.report import describe_memory, describe_parameters
from scar_jax.train.signals import StopRequest
from scar_jax.train.speed import Speed, peak_flops
from scar_jax.train.start import start_from
from scar_jax.train.step import Steps, compile_step, shapes_of
from scar_jax.train.tasks import Task, optional
from scar_jax.types import PyTree


class TrainingError(RuntimeError):
  """The run cannot go on; its last good checkpoint stays."""


def train(
  config: Config,
  workdir: paths.PathLike,
  task: Task | None = None,
  loader: Any = None,
  profile: Window | None = None,
) -> dict[str, Any]:
  """Trains, or goes on training, and exports the artifact.

  Args:
    config: checked.
    workdir: of this run, local or `gs://...`; created if absent. All processes
      of a run must see the same one.
    task: in place of the one that config names.
    loader: in place of the one that config describes: an iterator of batches
      with `get_state` and `set_state`.
    profile: first and last step of a profiler trace.

  Returns:
    The summary that is also written to `summary.json`.

  Raises:
    ValueError: the config is impossible here, or the work directory holds
      another run.
    TrainingError: too many steps in a row were not finite.
  """
  started = time.monotonic()
  workdir = paths.folder(workdir)
  mesh = sharding.make_mesh(vars(config.mesh))
  inputs.check_run(config, mesh)
  workdir.mkdir(parents=True, exist_ok=True)
  logging.info(
    'host %d of %d, %d devices, mesh %s, work directory %s',
    *(jax.process_index(), jax.process_count(), jax.device_count()),
    *(dict(mesh.shape), workdir),
  )
  with (
    jax.set_mesh(mesh),
    Compilations() as compiles,
    StopRequest() as stop,
  ):
    run = _prepare(config, workdir, mesh, task, loader)
    run.compiles = compiles
    run.profiler = Profiler(profile, workdir / 'profile')
    compiles.warm = True
    distributed.wait_for_all('first step')
    try:
      summary = _loop(run, stop)
    finally:
      run.profiler.close()
      run.writer.close()
      run.progress.close()
      run.close_loader()
      with metrics.stage('finish checkpoints'):
        run.checkpoints.close()
    if not summary['stopped']:
      with metrics.stage('artifact'):
        summary['artifact'] = _export(run)
  summary |= {
    'compilations': compiles.of('train_step'),
    'compiled_again': compiles.again,
    'seconds': time.monotonic() - started,
  }
  if jax.process_index() == 0:
    metrics.write_json(workdir / 'summary.json', summary)
  return summary


class _Run:
  """All objects of a run; filled by `_prepare`, used by `_loop`."""

  config: Config
  workdir: epath.Path
  mesh: Mesh
  task: Task
  loader: Any
  state: state_lib.TrainState
  frozen: Mapping[str, PyTree]
  step: Steps
  pictures: Any
  drawn: set[Any]
  compiles: Compilations
  checkpoints: Checkpoints
  writer: metrics.Writer
  progress: metrics.Progress
  profiler: Profiler
  fingerprints: dict[str, str]

  def close_loader(self) -> None:
    if hasattr(self.loader, 'close'):
      self.loader.close()


def _prepare(
  config: Config,
  workdir: epath.Path,
  mesh: Mesh,
  task: Task | None,
  loader: Any,
) -> _Run:
  """Stages 3 to 9: data, task, shapes, placement, state, compiled step."""
  run = _Run()
  run.config, run.workdir, run.mesh = config, workdir, mesh
  with metrics.stage('frozen networks and task'):
    run.task, run.fingerprints = inputs.make_task(config, mesh, task)
    placed = sharding.frozen_shardings(run.task.frozen, mesh)
    run.frozen = jax.device_put(dict(run.task.frozen), placed)
  run.checkpoints = Checkpoints(
    workdir,
    config_lib.to_dict(config),
    config.train.keep,
    config.train.best,
    run.fingerprints,
  )
  with metrics.stage('data'):
    run.loader = loader or inputs.make_loader(
      config, mesh, workdir, run.fingerprints
    )
    batch = inputs.first_batch(run.loader, mesh)
  with metrics.stage('shapes and placement'):
    made = assemble(config, run.task, batch, mesh)
    shapes, places = made.shapes, made.places
    describe_parameters(shapes.params, places.params)
  with metrics.stage('state'):
    run.state = _restore_or_create(run, made.init, shapes, places)
  inputs.write_config(workdir, config, run.fingerprints)
  with metrics.stage('compile the step'):
    abstract = abstract_with(shapes, places)
    run.step = Steps()
    for some in inputs.batches_of_sizes(run.loader, batch):
      logging.info('for batches of %s', dict(shapes_of(some)))
      step = compile_step(
        made.step,
        abstract,
        run.frozen,
        some,
        places,
        config.train.tpu_options,
      )
      describe_memory(step)
      run.step.add(some, step)
  draw = optional(run.task, 'pictures')
  whole = sharding.replicated(mesh)  # so that host 0 has all of them
  run.pictures = draw and jax.jit(
    draw,
    out_shardings=whole,
    compiler_options=compiler.options(sharding.platform()),
  )
  run.drawn = set()
  host0 = jax.process_index() == 0
  run.writer = metrics.Writer(workdir, host0)
  run.progress = metrics.Progress(
    config.train.steps, int(run.state.step), host0
  )
  return run


def _restore_or_create(
  run: _Run, init: Any, shapes: PyTree, places: PyTree
) -> state_lib.TrainState:
  """Own checkpoint, else a fresh state, from `init_from` where given."""
  config = run.config
  if config.train.resume or config.train.require_resume:
    found = run.checkpoints.restore(
      abstract_with(shapes, places), config.train.require_resume
    )
    if found is not None:
      state, position = found
      run.loader.set_state(position)
      logging.info('resumed at step %d, data at %s', state.step, position)
      return state
  else:
    run.checkpoints.refuse_existing()
  state = state_lib.create(init, places, config.seed)
  if config.init_from:
    start = artifacts.load_artifact(config.init_from, mesh=run.mesh)
    as_trained = optional(run.task, 'as_trained')
    params = start_from(
      config.init_from,
      state.params,
      as_trained(start.params) if as_trained else start.params,
      optional(run.task, 'new') or (),
    )
    # A second copy: the step donates both trees.
    average = jax.tree.map(jax.numpy.copy, params) if state.ema else {}
    state = state.replace(params=params, ema=average)
    logging.info('started from %s (%s)', start.path, start.fingerprint)
  return state


def _loop(run: _Run, stop: StopRequest) -> dict[str, Any]:
  """Stage 11: dispatch step n, read the scalars of n - 1, log, draw, save."""
  cfg = run.config.train
  step, saved = int(run.state.step), int(run.state.step)
  waiting: tuple[int, Any] | None = None
  seen: collections.deque[tuple[int, Any]] = collections.deque(
    maxlen=cfg.max_bad_steps + 1
  )
  means, recent, speed = metrics.Means(), metrics.Means(), _speed(run)
  last: dict[str, float] = {}

  def read() -> None:
    """Fetches the scalars of the step before; the device is busy already."""
    nonlocal waiting, last
    if waiting is None:
      return
    at, values = waiting
    waiting = None
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    _check_finite(at, values, seen, cfg.max_bad_steps)
    means.add(values)
    recent.add(values)
    speed.step()
    if at % cfg.log_every == 0 or at == cfg.steps:
      last = means.take() | speed.take()
      run.writer.scalars(at, last)
      text = f'loss {last["loss"]:.4f}  {last["steps_per_second"]:.2f} steps/s'
      logging.info('step %d of %d: %s', at, cfg.steps, text)
      run.progress.update(at, text)

  def save() -> None:
    nonlocal saved
    read()
    with speed.spend('checkpoint'):
      position = run.loader.get_state()
      run.checkpoints.save(run.state, position, recent.take())
      run.writer.flush()
    saved = step

  while step < cfg.steps and not stop.before(step + 1):
    run.profiler.before(step + 1)
    with speed.spend('data'):
      local = next(run.loader)
    batch = inputs.place_batch(local, run.mesh)
    run.state, values = run.step(run.state, run.frozen, batch)
    step += 1
    run.profiler.after(step, values)
    read()
    waiting = (step, values)
    seen.append((step, local.get('index')))
    if step % cfg.save_every == 0:
      save()
    if run.pictures and cfg.picture_every and step % cfg.picture_every == 0:
      _draw(run, step, batch)
  read()
  if saved != step:
    with metrics.stage('last checkpoint'):
      save()
  if stop.name:
    logging.warning('stopped by %s after step %d; saved', stop.name, step)
  return {
    'steps': step,
    'stopped': stop.name,
    'skipped_steps': int(run.state.skipped),
    'metrics': {k: v for k, v in last.items() if np.isfinite(v)},
    'parameters': sum(x.size for x in jax.tree.leaves(run.state.params)),
  }


def _speed(run: _Run) -> Speed:
  """What a step of this task moves and costs, as far as it says so."""
  batch = run.config.data.batch
  flops = optional(run.task, 'flops')
  return Speed(
    batch,
    tokens=optional(run.task, 'tokens') or 0,
    flops=sum(flops(batch).values()) if flops else 0.0,
    peak=peak_flops(run.mesh.devices.flat[0].device_kind),
    devices=run.mesh.size,
  )


def _check_finite(
  step: int, values: Mapping[str, float], seen: Any, limit: int
) -> None:
  """Tells of a skipped step; stops after `limit` in a row."""
  if not values['bad_in_row']:
    return
  rows = {at: index for at, index in seen if at <= step}
  logging.warning(
    'step %d skipped: loss %s, gradient norm %s, records %s',
    *(step, values['loss'], values['grad_norm'], _listed(rows.get(step))),
  )
  if values['bad_in_row'] >= limit:
    bad = range(step - limit + 1, step + 1)
    listed = '; '.join(f'step {n}: {_listed(rows.get(n))}' for n in bad)
    raise TrainingError(
      f'{limit} steps in a row, {bad[0]} to {step}, had a loss or gradient '
      f'that is not finite (loss {values["loss"]}, gradient norm '
      f'{values["grad_norm"]}). Records: {listed}. The last good checkpoint '
      'stays (raise --config.train.max_bad_steps, or lower --config.optim.lr)'
    )


def _listed(index: Any) -> str:
  return 'unknown' if index is None else str(np.asarray(index).tolist())


def _draw(run: _Run, step: int, batch: Mapping[str, jax.Array]) -> None:
  """Sample pictures of this batch, with the weights that will be exported."""
  weights = run.state.ema or run.state.params
  rng = jax.random.fold_in(jax.random.key(run.config.seed), step)
  shapes = shapes_of(batch)
  with run.compiles.expected(shapes not in run.drawn):
    images = run.pictures(weights, run.state.extra, run.frozen, batch, rng)
  run.drawn.add(shapes)
  run.writer.pictures(
    step, {k: np.asarray(v) for k, v in jax.device_get(images).items()}
  )


def _export(run: _Run) -> str:
  """Writes the artifact, each process its part; returns its fingerprint."""
  weights = run.state.ema or run.state.params
  kind, cfg, params = run.task.artifact(weights, run.state.extra)
  return artifacts.save_artifact(
    run.workdir / 'artifact',
    kind,
    cfg,
    params,
    {
      'task': run.config.task,
      'steps': int(run.state.step),
      'ema': run.config.train.ema,
      'made_from': run.fingerprints,
    },
  )
