"""Lowers and compiles the real programs for a topology that is not here.

In: a checked config and a `Topology`. Out: a `Program`: the compiled module's
text and memory, or how much memory was missing. All arrays are abstract: a
laptop compiles for a pod. The TPU compiler comes from the package libtpu.
"""

import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from scar_jax import sharding
from scar_jax.config import Config, batch_per_device, check_tensor_axis
from scar_jax.data.batches import shapes_of
from scar_jax.data.manifest import job_of
from scar_jax.extras import require
from scar_jax.parts import to_uint8
from scar_jax.plan.chips import Topology
from scar_jax.plan.kernels import kernel_flops
from scar_jax.plan.networks import abstract_artifacts
from scar_jax.precision import for_sampling
from scar_jax.sampling import generate
from scar_jax.sampling_steps import split_scales
from scar_jax.train.assemble import Assembly, assemble
from scar_jax.train.checkpoints import abstract_with
from scar_jax.train.step import compile_with, trace_step
from scar_jax.train.tasks import make_task
from scar_jax.train.tasks.scar import ScarTask
from scar_jax.types import Array, PyTree

# The compiler's least effort: no search for the best tiles of each fusion.
_QUICK: Any = {'exec_time_optimization_effort': -1.0}
# Two cores that look like one device, as on all later chips.
_CHIP_CONFIG = {'v4': {'chip_config_name': 'megacore'}}
_SHORTAGES = (
  r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm',
  r'temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM',
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of HBM on one chip; fields of `parts` add up to `total`.

  Attributes:
    total: that the program needs at its peak.
    parts: what of: parameters, optimizer, ...
  """

  total: float
  parts: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program.

  Attributes:
    text: of the compiled module; '' where it did not fit.
    memory: of one chip.
    seconds: that lowering and compiling took.
    mesh: axis -> size.
    coords: of the devices, in mesh order: slice, then place in the torus.
    kernels: see `costs.count`.
  """

  text: str
  memory: Memory
  seconds: float
  mesh: dict[str, int]
  coords: tuple[tuple[int, ...], ...]
  kernels: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Setup:
  """A run on a described mesh: task, abstract batch, state, frozen networks.

  With `quick` the compiler searches for no better tiles.
  """

  config: Config
  task: Any
  mesh: Mesh
  batch: dict[str, jax.ShapeDtypeStruct]
  frozen: dict[str, PyTree]
  assembly: Assembly
  quick: bool = False

  @property
  def state(self) -> PyTree:
    """Abstract, placed."""
    return abstract_with(self.assembly.shapes, self.assembly.places)


def prepare_environment() -> None:
  """Lets libtpu load where there is no TPU; before JAX asks for devices."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # Plans may run side by side: none of them holds a device.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # The plan needs no device of this machine, and a TPU may be in use.
  jax.config.update('jax_platforms', 'cpu')


@functools.lru_cache(maxsize=4)
def devices_of(topology: Topology) -> tuple[Any, ...]:
  """Compile-only devices of a topology.

  Raises:
    ValueError: libtpu is missing, or it does not know the topology.
  """
  require('libtpu', 'plan')
  prepare_environment()
  from jax.experimental import topologies

  sides = 'x'.join(map(str, topology.sides))
  extra: dict[str, Any] = dict(_CHIP_CONFIG.get(topology.chip.name, {}))
  if topology.slices > 1:
    extra['num_slices'] = topology.slices
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=f'{topology.chip.name}:{sides}', **extra
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'topology={topology.name!r} is unknown to the TPU compiler: '
      f'{str(error).splitlines()[0]} (set --topology)'
    ) from error
  return tuple(found.devices)


def set_up(
  config: Config,
  topology: Topology,
  quick: bool = False,
  cached_tokens: bool = False,
) -> Setup:
  """Builds everything but the program.

  Args:
    config: checked.
    topology: for which.
    quick: see `Setup`.
    cached_tokens: see `abstract_batch`.

  Raises:
    ValueError: sizes that do not divide, a network that is not named.
  """
  mesh = sharding.make_mesh(vars(config.mesh), devices_of(topology))
  batch_per_device(
    config.data.batch, sharding.batch_ways(mesh), config.train.accum
  )
  # Starting the tables from codes changes values, not shapes.
  if getattr(config.model, 'codebook_init', False):
    model = dataclasses.replace(config.model, codebook_init=False)
    config = dataclasses.replace(config, model=model)
  task = make_task(config, abstract_artifacts(config))
  if isinstance(task, ScarTask):
    heads = task.editor.model.decoder.heads
    check_tensor_axis(mesh.shape['tensor'], heads)
  places = sharding.frozen_shardings(dict(task.frozen), mesh)
  batch = abstract_batch(config, task, mesh, cached_tokens)
  with jax.set_mesh(mesh):
    made = assemble(config, task, batch, mesh)
  return Setup(
    config,
    task,
    mesh,
    batch,
    abstract_with(dict(task.frozen), places),
    made,
    quick,
  )


def abstract_batch(
  config: Config, task: Any, mesh: Mesh, cached_tokens: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch, as the loader would give them.

  Args:
    config: checked.
    task: that the batch is for.
    mesh: over which it is split.
    cached_tokens: the target's tokens come with its picture, as from a cache
      of `scar tokenize`: the step runs the encoder, and no tokenizer.

  Raises:
    ValueError: `cached_tokens` for a task that predicts none.
  """
  count, size = config.data.batch, config.data.image_size
  pictures = ('target',)
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {
    'valid': ((), jnp.bool_),
    'index': ((), jnp.int32),
  }
  if isinstance(task, ScarTask):
    model = task.editor.model
    if model.prefix.compress != 'off':
      pictures = ('target', 'condition')
    if model.text.kind == 'label':
      shapes['label'] = ((), jnp.int32)
    elif model.text.kind != 'none':
      shapes['text'] = ((model.text.length,), jnp.int32)
      shapes['text_mask'] = ((model.text.length,), jnp.bool_)
    if cached_tokens:
      shapes['tokens'] = ((task.tokens,), jnp.int32)
  elif cached_tokens:
    raise ValueError(
      f"--cached_tokens with task={config.task!r}; accepted: task='scar' "
      '(set --config)'
    )
  for name, _ in getattr(config.loss, 'labels', ()):
    shapes[f'label_{name}'] = ((), jnp.int32)
  shapes |= dict.fromkeys(pictures, ((size, size, 3), jnp.float32))
  job = job_of(config.data)
  if job is not None:
    kept = {name: shapes[name] for name in ('valid', 'index')}
    shapes = kept | shapes_of(job.columns)
  where = sharding.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct((count, *shape), dtype, sharding=where)
    for name, (shape, dtype) in shapes.items()
  }


def compile_train(setup: Setup) -> Program:
  """The optimiser step, as `scar train` compiles it."""

  def trace() -> jax.stages.Traced:
    return trace_step(
      setup.assembly.step,
      setup.state,
      setup.frozen,
      setup.batch,
      setup.assembly.places,
    )

  state = setup.state
  arguments = {
    'parameters': state.params,
    'optimizer': state.opt_state,
    'average': state.ema,
    'frozen networks': setup.frozen,
    'batch': setup.batch,
  }
  return _compile(setup, trace, arguments, setup.config.train.tpu_options)


def compile_sample(setup: Setup) -> Program:
  """Conditions, sampler and decoder in one program.

  Raises:
    ValueError: the task makes no pictures.
  """
  task = setup.task
  if not isinstance(task, ScarTask):
    raise ValueError(
      f"--sample with task={setup.config.task!r}; accepted: task='scar' "
      '(set --config)'
    )
  # Kernels in the type of their products, as `Editor` keeps them.
  params = abstract_with(
    jax.eval_shape(
      functools.partial(for_sampling, task.editor.model, turn=False),
      setup.state.params,
    ),
    setup.assembly.places.params,
  )
  given = {k: v for k, v in setup.batch.items() if k not in _ONLY_TRAINING}
  seeds = jax.ShapeDtypeStruct(
    (setup.config.data.batch,),
    jnp.uint32,
    sharding=sharding.batch_sharding(setup.mesh),
  )

  # Before the mesh is set: it makes small arrays, and the mesh cannot run.
  program = jax.jit(sample_program(task))

  def trace() -> jax.stages.Traced:
    return program.trace(params, setup.frozen, given, seeds)

  arguments = {
    'parameters': params,
    'frozen networks': setup.frozen,
    'batch': (given, seeds),
  }
  return _compile(setup, trace, arguments)


_ONLY_TRAINING = ('target', 'valid', 'index')


def sample_program(task: ScarTask) -> Callable[..., Array]:
  """`(params, frozen, batch, seeds) -> images`, what `Editor` does in steps."""
  scales, settings = split_scales(task.editor.sample)

  def sample(
    params: PyTree, frozen: Mapping[str, PyTree], batch: Any, seeds: jax.Array
  ) -> Array:
    cond, _ = task.parts.conditions(frozen, batch)
    made = generate(
      task.model,
      {'params': params},
      cond,
      seeds,
      scales,
      settings,
      accumulate=task.parts.accumulate(frozen),
    )
    return to_uint8(task.parts.images(frozen, made.tokens, made.latent))

  return sample


def _compile(
  setup: Setup,
  trace: Callable[[], jax.stages.Traced],
  arguments: Mapping[str, PyTree],
  options: Iterable[tuple[str, str]] = (),
) -> Program:
  """Runs the compiler; too little memory is an answer, not an error."""
  parts = {name: bytes_per_device(tree) for name, tree in arguments.items()}
  started = time.monotonic()
  text = ''
  with jax.set_mesh(setup.mesh):
    traced = trace()
    lowered = traced.lower()
    try:
      compiled = compile_with(lowered, options, _QUICK if setup.quick else None)
      text = compiled.as_text() or ''
      total = _peak(compiled)
    except jax.errors.JaxRuntimeError as error:
      needed = read_shortage(str(error))
      if needed is None:
        raise
      total = needed
  parts['temporaries'] = max(total - sum(parts.values()), 0.0)
  devices = setup.mesh.devices.flat
  return Program(
    text=text,
    memory=Memory(total, {k: v for k, v in parts.items() if v}),
    seconds=time.monotonic() - started,
    mesh=dict(setup.mesh.shape),
    coords=tuple(
      (getattr(d, 'slice_index', 0) or 0, *getattr(d, 'coords', (d.id,)))
      for d in devices
    ),
    kernels=kernel_flops(traced.jaxpr),
  )


def bytes_per_device(tree: PyTree) -> float:
  """Bytes of the shards of one device, without the padding of tiles."""
  total = 0.0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = jnp.dtype(leaf.dtype).itemsize
    for dim in shape:
      size *= dim
    total += size
  return total


def _peak(compiled: jax.stages.Compiled) -> float:
  """Arguments, results that are no arguments, temporaries and code."""
  memory: Any = compiled.memory_analysis()
  return float(
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )


def read_shortage(message: str) -> float | None:
  """Bytes that a program needs, of the compiler's out-of-memory message."""
  found = next(filter(None, (re.search(s, message) for s in _SHORTAGES)), None)
  return float(found[1]) * _UNITS[found[2]] if found else None
