"""Frozen networks as shapes: by size, or by the config of an artifact."""

import dataclasses

import jax
import pytest
from scar_setup import frozen_artifacts, scar_config

from scar_jax.artifacts import save_artifact
from scar_jax.plan.networks import abstract_artifacts, network_config


def test_a_size_takes_fields_that_differ():
  cfg = network_config('encoder', 'B,image_size=448,features=last4')
  assert (cfg.width, cfg.image_size, cfg.features) == (768, 448, 'last4')
  assert network_config('text', 'flan-t5-xl,dtype=bfloat16').dtype == 'bfloat16'
  scales = network_config('tokenizer', 'tiny,patch_nums=1,2,4,ch=8')
  assert (scales.patch_nums, scales.ch) == ((1, 2, 4), 8)


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('encoder', 'C', "encoder size 'C'; accepted: tiny"),
    ('tokenizer', 'vq61', "tokenizer size 'vq61'"),
    ('text', 'flan-t5-xl,wide=3', "no field 'text.size.wide'. Did you mean"),
    ('encoder', 'B,depth=x', "encoder.size.depth='x' is not a whole number"),
  ],
)
def test_what_is_no_network_is_an_error(name, text, message):
  with pytest.raises(ValueError) as error:
    network_config(name, text)
  assert message in str(error.value)


def test_shapes_are_those_of_the_artifact_and_hold_nothing(tmp_path):
  real = frozen_artifacts()['encoder']
  save_artifact(tmp_path / 'encoder', 'encoder', real.config, real.params)
  config = scar_config(
    encoder__artifact=str(tmp_path / 'encoder'), tokenizer__size='tiny'
  )
  found = abstract_artifacts(config)
  assert sorted(found) == ['encoder', 'tokenizer']
  assert found['encoder'].config == real.config
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), found['encoder'].params)
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), real.params)
  leaves = jax.tree.leaves([dataclasses.astuple(a) for a in found.values()])
  assert not any(isinstance(leaf, jax.Array) for leaf in leaves)


def test_an_artifact_that_is_not_there_is_an_error():
  with pytest.raises(ValueError, match=r'no artifact at .*nowhere: no such'):
    abstract_artifacts(scar_config(tokenizer__artifact='nowhere'))
