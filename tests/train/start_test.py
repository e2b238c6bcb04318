"""Starting from a model that lacks some parts."""

import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.train.start import start_from


def _params(value, *names):
  tree = {'decoder': {'kernel': jnp.full((2, 2), value)}}
  return tree | {name: {'x': jnp.full(3, value)} for name in names}


def test_parts_that_may_be_new_start_afresh():
  fresh, given = _params(1.0, 'prefix'), _params(2.0)
  made = start_from('run', fresh, given, ('prefix/', 'query'))
  np.testing.assert_array_equal(made['decoder']['kernel'], 2.0)
  np.testing.assert_array_equal(made['prefix']['x'], 1.0)
  # A model that has them is taken whole.
  made = start_from('run', fresh, _params(2.0, 'prefix'), ('prefix/',))
  np.testing.assert_array_equal(made['prefix']['x'], 2.0)


def test_all_else_must_fit():
  fresh = _params(1.0, 'prefix')
  with pytest.raises(ValueError, match=r'run does not fit.*missing prefix/x'):
    start_from('run', fresh, _params(2.0))
  with pytest.raises(ValueError, match='unexpected text/x'):
    start_from('run', fresh, _params(2.0, 'text'), ('prefix/',))
  given = _params(2.0, 'prefix')
  given['prefix']['x'] = jnp.zeros(4)
  with pytest.raises(ValueError, match=r'prefix/x: expected \(3,\), got \(4,'):
    start_from('run', fresh, given, ('prefix/',))
