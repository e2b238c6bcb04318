"""Eight emulated CPU devices, cheap compilation, and paths to fixtures."""

import os

# Set before jax is imported anywhere: the device count is read once. Programs
# here are small and run a few times, so that to compile them is most of the
# time: no optimised code, the older and quicker emitters, and no split of a
# program among threads, which the other workers keep busy. XLA_FLAGS of the
# caller may ask for the defaults again.
os.environ['XLA_FLAGS'] = (
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
  ' --xla_cpu_parallel_codegen_split_count=1 '
  + os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import gc
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

jax.config.update('jax_threefry_partitionable', True)


@pytest.fixture(scope='session', autouse=True)
def _compilation_cache(tmp_path_factory):
  """Tests compile the same toys and fixtures again and again: share them."""
  root = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    root = root.parent  # that of all workers
  jax.config.update('jax_compilation_cache_dir', str(root / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  yield
  jax.config.update('jax_compilation_cache_dir', None)


# The files that take longest. They come first: a worker takes a file at a time,
# so that what a module shares is made once, and one that began late would keep
# it when the others have nothing left to do.
_LONG = (
  'selftest_test.py', 'scale_task_test.py', 'class_control_test.py',
  'sharding_test.py', 'sampling_random_test.py', 'scar_task_test.py',
  'hosts_test.py', 'checkpoints_test.py', 'decoding_test.py',
  'editor_mask_test.py', 'editor_test.py', 'sampling_test.py',
)  # fmt: skip


def pytest_collection_modifyitems(items):
  order = {name: i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
  """What was imported stays: the collector need not look at it each time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


_HERE = pathlib.Path(__file__).parent


def _find(folder: str, name: str) -> pathlib.Path:
  """Shared fixtures first, their committed copies second."""
  shared = _HERE.parent.parent / 'shared' / folder / name
  return shared if shared.exists() else _HERE / folder / name


@pytest.fixture(scope='session')
def golden():
  """`golden('vq8') -> (tensors, arrays)`: weights and expected values."""

  def load(name: str, weights: str | None = None):
    arrays = dict(np.load(_find('golden', f'{name}.npz')))
    path = _find('golden', f'{weights or name}.safetensors')
    return (load_file(path) if path.exists() else {}), arrays

  return load


@pytest.fixture(scope='session')
def golden_path():
  """Path of one file of the golden fixtures."""
  return lambda name: _find('golden', name)


@pytest.fixture(scope='session')
def case():
  """Path of one file of the bad-input cases."""
  return lambda name: _find('cases', name)
