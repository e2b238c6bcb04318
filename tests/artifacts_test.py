"""What an artifact holds, where it is placed, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from scar_jax import sharding
from scar_jax.artifacts import load_artifact, save_artifact
from scar_jax.models.encoders.semantic import EncoderConfig

CONFIG = EncoderConfig(image_size=56)


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  large = rng.normal(size=(1024, 2048)).astype(np.float32)
  return {'network': {'large': large, 'small': large[0, :8].copy()}}


def test_parameters_come_back_with_config_and_notes(params, tmp_path):
  mark = save_artifact(tmp_path / 'a', 'encoder', CONFIG, params, {'step': 7})
  found = load_artifact(tmp_path / 'a')
  assert (found.kind, found.config) == ('encoder', CONFIG)
  assert (found.fingerprint, found.meta) == (mark, {'step': 7})
  jax.tree.map(np.testing.assert_array_equal, found.params, params)
  other = dataclasses.replace(CONFIG, image_size=112)
  assert save_artifact(tmp_path / 'b', 'encoder', other, params) != mark


def test_large_parameters_are_read_in_pieces(params, tmp_path, monkeypatch):
  """No device, and no host, asks storage for the whole of a large array."""
  import tensorstore as ts

  asked = []
  read = ts.TensorStore.__getitem__

  def spy(store, index):
    asked.append(read(store, index).shape)
    return read(store, index)

  save_artifact(tmp_path, 'encoder', CONFIG, params)
  mesh = sharding.make_mesh({'fsdp': 8})
  monkeypatch.setattr(ts.TensorStore, '__getitem__', spy)
  found = load_artifact(tmp_path, mesh=mesh).params['network']
  assert found['large'].sharding.spec == P(None, 'fsdp')
  assert {s.data.shape for s in found['large'].addressable_shards} == {
    (1024, 256)
  }
  assert (1024, 256) in asked
  assert (1024, 2048) not in asked
  assert found['small'].sharding.is_fully_replicated
  np.testing.assert_array_equal(found['large'], params['network']['large'])


def test_what_is_no_number_is_not_exported(params, tmp_path):
  params['network']['small'][3] = np.nan
  with pytest.raises(ValueError, match='network/small is not finite'):
    save_artifact(tmp_path / 'a', 'encoder', CONFIG, params)
  assert not list(tmp_path.iterdir())


def test_an_artifact_of_another_kind_or_format(params, tmp_path):
  save_artifact(tmp_path / 'runs', 'encoder', CONFIG, params)
  with pytest.raises(ValueError, match="holds a 'encoder' artifact; wanted: t"):
    load_artifact(tmp_path / 'runs', 'tokenizer')
  with pytest.raises(ValueError, match="Did you mean 'runs'"):
    load_artifact(tmp_path / 'rums')
  with pytest.raises(ValueError, match=r'wanted config\.json and params there'):
    load_artifact(tmp_path)
  file = tmp_path / 'runs' / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'format': 99}))
  with pytest.raises(ValueError, match='artifact format 99, this version'):
    load_artifact(tmp_path / 'runs')
  file.write_text('{')
  with pytest.raises(ValueError, match='is not JSON'):
    load_artifact(tmp_path / 'runs')
