"""Rows of a batch: which ones a host loads, and where they are placed."""

import jax
import numpy as np
import pytest
from etils import epath

from scar_jax import config as config_lib
from scar_jax import paths
from scar_jax.sharding import batch_sharding, make_mesh
from scar_jax.train import inputs


class _Host:
  """A sharding that shows only some of its devices: those of one host."""

  def __init__(self, where, devices):
    self.where, self.devices = where, devices

  def addressable_devices_indices_map(self, shape):
    places = self.where.devices_indices_map(shape)
    return {d: places[d] for d in self.devices}


@pytest.mark.parametrize(
  ('axes', 'devices', 'rows'),
  [
    ({'data': 8}, (0, 1, 2, 3), range(8)),
    ({'data': 8}, (2, 3, 6, 7), (4, 5, 6, 7, 12, 13, 14, 15)),
    ({'data': 2, 'fsdp': 4}, (4, 5, 6, 7), range(8, 16)),
    # The tensor axis spans both hosts: each needs all rows.
    ({'data': 1, 'tensor': 8}, (4, 5, 6, 7), range(16)),
  ],
)
def test_rows_of_a_host(monkeypatch, axes, devices, rows):
  mesh = make_mesh(axes)
  mine = [mesh.devices.flat[i] for i in devices]
  monkeypatch.setattr(
    inputs.sharding,
    'batch_sharding',
    lambda mesh: _Host(batch_sharding(mesh), mine),
  )
  inputs.local_rows.cache_clear()
  assert inputs.local_rows(mesh, 16) == tuple(rows)
  inputs.local_rows.cache_clear()


def test_placed_rows_are_those_of_the_batch():
  mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  batch = {'target': np.arange(48.0).reshape(8, 6), 'valid': np.ones(8, bool)}
  placed = inputs.place_batch(batch, mesh)
  for name, value in batch.items():
    np.testing.assert_array_equal(placed[name], value)
    assert placed[name].sharding == batch_sharding(mesh)
  assert inputs.local_rows(mesh, 8) == tuple(range(8))
  assert len(jax.devices()) == 8


def test_bad_records_are_listed_in_a_local_work_directory(tmp_path):
  raw = config_lib.default_config('encoder')
  raw.data.update({'source': 'scenes', 'kind': 'image', 'batch': 8})
  config, mesh = config_lib.check(raw), make_mesh({'data': 8})
  loader = inputs.make_loader(config, mesh, paths.folder(tmp_path))
  assert loader.bad.path == tmp_path / 'bad_records.jsonl'
  loader = inputs.make_loader(config, mesh, epath.Path('gs://bucket/run'))
  assert loader.bad.path is None
