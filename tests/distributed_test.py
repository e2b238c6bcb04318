"""Who the other processes are: read off flags and schedulers, or refused."""

import jax
import pytest

from scar_jax import distributed

_SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_PROCID': '3',
  'SLURM_NTASKS': '16',
}


@pytest.mark.parametrize(
  ('env', 'name'),
  [
    ({}, ''),
    (_SLURM, 'Slurm'),
    (_SLURM | {'SLURM_NTASKS': '1'}, ''),
    # An allocation, but not a step of it.
    ({k: v for k, v in _SLURM.items() if 'STEP' not in k}, ''),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, ''),
    ({'TPU_WORKER_HOSTNAMES': 'a,b,c,d'}, 'GKE'),
    ({'TPU_PROCESS_ADDRESSES': 'a:1,b:1'}, 'GKE'),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, 'GKE'),
    ({'OMPI_COMM_WORLD_SIZE': '4'}, 'Open MPI'),
  ],
)
def test_schedulers_that_tell_of_several_processes(env, name):
  assert distributed.environment(env) == name


def test_the_address_of_flags_comes_before_that_of_the_environment():
  env = {
    'JAX_COORDINATOR_ADDRESS': 'job-0',
    'JAX_COORDINATOR_PORT': '6002',
    'NNODES': '4',
    'NODE_RANK': '3',
  }
  assert distributed.explicit('', None, None, env) == ('job-0:6002', 4, 3)
  assert distributed.explicit('a:1', 2, 0, env) == ('a:1', 2, 0)
  assert distributed.explicit('', None, None, {}) is None
  # The scheduler's own plug-in knows the rest.
  only = {'JAX_COORDINATOR_ADDRESS': 'job-0:1'}
  assert distributed.explicit('', None, None, only) is None


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('a:1', None, 0), r'--processes=None .*accepted: all three'),
    (('', 2, 0), r'--coordinator= .*accepted: all three'),
    (('a', 2, 0), 'accepted: HOST:PORT'),
    (('a:1', 2, 2), 'process < processes'),
  ],
)
def test_half_an_address_is_refused(flags, message):
  with pytest.raises(ValueError, match=message):
    distributed.explicit(*flags, {})


def test_an_environment_without_a_number_is_refused():
  with pytest.raises(ValueError, match=r"SLURM_NTASKS='4\(x2\)'.*whole number"):
    distributed.environment({'SLURM_NTASKS': '4(x2)'})


@pytest.fixture
def asked(monkeypatch):
  """Arguments of the calls to JAX, which does nothing."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *a, **k: calls.append((a, k))
  )
  return calls


def test_nothing_is_started_for_one_process(asked):
  distributed.start(env={})
  distributed.start(wanted=False, env=_SLURM)
  assert asked == []


def test_jax_is_asked_where_there_are_several(asked):
  distributed.start(env=_SLURM)
  distributed.start(wanted=True, env={})
  distributed.start(None, 'a:1', 2, 1, {})
  assert [a for a, _ in asked] == [(), (), ('a:1', 2, 1)]


def test_those_who_are_not_found_are_told_with_what_is_accepted(monkeypatch):
  def fail(**_):
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', fail)
  with pytest.raises(
    ValueError, match=r'no environment that JAX knows.*coordinator_address sh'
  ):
    distributed.start(wanted=True, env={})


def test_a_pod_that_was_not_joined_is_refused(monkeypatch):
  distributed.check_joined()
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  with pytest.raises(ValueError, match=r'process 0 of 4.*--distributed'):
    distributed.check_joined()


def test_one_process_agrees_with_itself():
  assert distributed.word_of_first([3, 1]) == [3, 1]
  assert distributed.all_agree(True)
  assert not distributed.all_agree(False)
