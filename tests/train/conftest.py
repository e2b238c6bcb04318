"""Tests of the trainer compile the same toy again and again: share it."""

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def _compilation_cache(tmp_path_factory):
  jax.config.update(
    'jax_compilation_cache_dir', str(tmp_path_factory.mktemp('xla'))
  )
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  yield
  jax.config.update('jax_compilation_cache_dir', None)
