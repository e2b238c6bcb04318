"""Several processes as one program: who is who, and one word among all.

In: flags of a command and what a scheduler set in the environment. Out: a
started `jax.distributed`, or nothing where there is one process; and the
few agreements that a run of several processes needs. Called by `scar train`
before it first asks for a device, and by `train/`.

JAX itself reads the addresses off Cloud TPU, GKE, Slurm and Open MPI
(`jax.distributed.initialize`); here it is only decided whether to ask.
"""

import itertools
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

# Where schedulers without a plug-in of JAX put the three facts; XPK's GPU jobs
# set the second names.
_COORDINATOR = 'JAX_COORDINATOR_ADDRESS'
_COUNT = ('JAX_NUM_PROCESSES', 'NNODES')
_INDEX = ('JAX_PROCESS_ID', 'NODE_RANK')
_PORT = 'JAX_COORDINATOR_PORT'
_SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_PROCID')
_TIMEOUT_SECS = 300
# After an error in one process the others learn of it so much later.
_SHUTDOWN_SECS = 60
_BARRIERS = itertools.count()  # a barrier's name is used once


def start(
  wanted: bool | None = None,
  coordinator: str = '',
  processes: int | None = None,
  process: int | None = None,
  env: Mapping[str, str] = os.environ,
) -> None:
  """Joins the other processes of this program, if there are any.

  Args:
    wanted: True must find several processes' environment, False never looks,
      None joins where the environment tells of more than one process.
    coordinator: `host:port` of process 0; with `processes` and `process` it
      takes the place of the environment.
    processes: how many there are.
    process: index of this one, from 0.
    env: the environment.

  Raises:
    ValueError: part of the address is missing, or the others were not found.
  """
  given = explicit(coordinator, processes, process, env)
  where = 'given address' if given else environment(env)
  if wanted is False or not (wanted or where):
    return
  logging.info(
    'joining %s (%s); --nodistributed trains alone',
    *(f'{given[1]} processes at {given[0]}' if given else 'the other processes',
      where or 'asking JAX'),
  )  # fmt: skip
  try:
    if given:
      address, count, index = given
      jax.distributed.initialize(
        address,
        count,
        index,
        # All devices of this host are ours, whatever a scheduler is around.
        cluster_detection_method='deactivate',
        initialization_timeout=_TIMEOUT_SECS,
        shutdown_timeout_seconds=_SHUTDOWN_SECS,
      )
    else:
      jax.distributed.initialize(
        initialization_timeout=_TIMEOUT_SECS,
        shutdown_timeout_seconds=_SHUTDOWN_SECS,
      )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f'the processes of this program did not find each other '
      f'({where or "no environment that JAX knows"}): {error}. Accepted: an '
      'environment of Cloud TPU, GKE, Slurm or Open MPI, or --coordinator='
      'HOST:PORT --processes=N --process=I on each (--nodistributed: alone)'
    ) from error
  logging.info(
    'process %d of %d (%s): %d of %d devices, %s',
    *(jax.process_index(), jax.process_count(), where or 'found by JAX'),
    *(jax.local_device_count(), jax.device_count()),
    jax.devices()[0].device_kind,
  )
  if jax.process_index():
    # One voice is enough; what is wrong is told by each.
    logging.set_verbosity(logging.WARNING)


def explicit(
  coordinator: str,
  processes: int | None,
  process: int | None,
  env: Mapping[str, str],
) -> tuple[str, int, int] | None:
  """`(host:port, count, index)` of flags, else of the environment, else None.

  Raises:
    ValueError: only some of the three are given, or they are impossible.
  """
  if not coordinator and processes is None and process is None:
    if _COORDINATOR not in env:
      return None
    coordinator = env[_COORDINATOR]
    if ':' not in coordinator and _PORT in env:
      coordinator += f':{env[_PORT]}'
    processes = _first_number(env, _COUNT)
    process = _first_number(env, _INDEX)
    if processes is None and process is None:
      return None  # only the address: the scheduler's plug-in knows the rest
  told = f'--coordinator={coordinator} --processes={processes} '
  told += f'--process={process}'
  if not coordinator or processes is None or process is None:
    raise ValueError(
      f'{told}: accepted: all three of them, on every process (or, in the '
      f'environment, {_COORDINATOR}, {" or ".join(_COUNT)}, '
      f'{" or ".join(_INDEX)})'
    )
  port = coordinator.rpartition(':')[2]
  if not port.isdigit() or not 0 <= process < processes:
    raise ValueError(
      f'{told}: accepted: HOST:PORT of process 0, and 0 <= process < processes'
    )
  return coordinator, processes, process


def _first_number(env: Mapping[str, str], names: Sequence[str]) -> int | None:
  for name in names:
    if name in env:
      if not env[name].isdigit():
        raise ValueError(f'{name}={env[name]!r}: accepted: a whole number')
      return int(env[name])
  return None


def environment(env: Mapping[str, str]) -> str:
  """The scheduler that tells of more than one process, or ''."""
  hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  slices = _first_number(env, ('MEGASCALE_NUM_SLICES',)) or 1
  if hosts and len(hosts.split(',')) * slices > 1:
    return 'GKE'
  # Inside an allocation but outside `srun` there is one process.
  tasks = _first_number(env, ('SLURM_NTASKS',)) or 1
  if all(name in env for name in _SLURM) and tasks > 1:
    return 'Slurm'
  ranks = _first_number(env, ('OMPI_COMM_WORLD_SIZE',)) or 1
  return 'Open MPI' if ranks > 1 else ''


def check_joined() -> None:
  """Refuses a pod whose processes run side by side without a word.

  Raises:
    ValueError: there are several, and `start` was not asked to join them.
  """
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise ValueError(
      f'this is process {jax.process_index()} of {jax.process_count()}, but '
      'they were not joined: give --distributed to every process'
    )


def word_of_first(values: Sequence[int], length: int = 64) -> list[int]:
  """Numbers that process 0 has, on every process; at most `length`, not -1."""
  if jax.process_count() == 1:
    return list(values)
  wait_for_all('word of the first')
  padded = np.full(length, -1, np.int64)
  padded[: len(values)] = np.asarray(values[:length], np.int64)
  told = multihost_utils.broadcast_one_to_all(padded.astype(np.int32))
  return [int(v) for v in np.asarray(told) if v >= 0]


def all_agree(good: bool) -> bool:
  """Whether it is true on every process."""
  if jax.process_count() == 1:
    return good
  wait_for_all('all agree')
  return bool(multihost_utils.process_allgather(np.asarray(good)).all())


def on_host(array: jax.Array) -> np.ndarray:
  """All values of an array, on every host, however it is spread."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def wait_for_all(what: str, timeout_secs: int = 3600) -> None:
  """Blocks until every process is here, without a word to the devices.

  Connections between devices are made at the first collective, by a deadline of
  seconds: one host that compiles longer than the others would miss it.

  Raises:
    RuntimeError: another process did not come.
  """
  count = jax.process_count()
  if count > 1:
    # Orbax is heavy, and one process does not need it.
    from orbax.checkpoint import multihost

    multihost.sync_global_processes(
      f'scar_jax: {what} {next(_BARRIERS)}',
      timeout=timeout_secs,
      processes=set(range(count)),
    )
