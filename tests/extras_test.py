"""Packages of extras: imported, or the extra is named."""

import sys

import pytest

from scar_jax.extras import require


def test_installed_package_is_the_module():
  assert require('numpy.linalg', 'data') is sys.modules['numpy.linalg']


def test_absent_package_names_its_extra():
  with pytest.raises(ValueError, match=r'no_such_thing .*scar_jax\[demo\]'):
    require('no_such_thing.part', 'demo')


def test_fault_inside_a_package_stays_its_own(tmp_path, monkeypatch):
  (tmp_path / 'half_there.py').write_text('import no_such_thing')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match='no_such_thing'):
    require('half_there', 'demo')
