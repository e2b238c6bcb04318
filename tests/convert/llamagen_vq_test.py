import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.convert import llamagen_vq
from scar_jax.convert.common import disassemble, flatten
from scar_jax.models.tokenizers.vq import VQConfig, VQModel, vq_config

CFG = VQConfig(codes=64, ch=32, ch_mult=(1, 1, 1, 2, 1), z_channels=32)


def test_every_tensor_is_used_and_comes_back(golden):
  state, _ = golden('vq16')
  params = llamagen_vq.convert(CFG, state)
  np.testing.assert_array_equal(
    params['encoder']['conv_in']['kernel'][2, 1, 0, 5],
    state['encoder.conv_in.weight'][5, 0, 2, 1],
  )
  back = disassemble(llamagen_vq.table(CFG), params)
  # The buffer of usage counts is no weight.
  assert set(state) - set(back) == {'quantize.codebook_used'}
  for name, value in back.items():
    np.testing.assert_array_equal(value, state[name])


@pytest.mark.parametrize('size', ['vq16', 'vq8'])
def test_the_table_covers_the_full_sizes(size):
  cfg = vq_config(size)
  shapes = jax.eval_shape(
    VQModel(cfg).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))
  )
  ours = [entry.path for entry in llamagen_vq.table(cfg)]
  assert sorted(ours) == sorted(flatten(shapes['params']))


def test_missing_unexpected_and_misshapen_tensors_are_listed(golden):
  state, _ = golden('vq16')
  broken = {**state, 'loss.weight': np.zeros(1)}
  del broken['quant_conv.bias']
  broken['post_quant_conv.bias'] = np.zeros(9, np.float32)
  with pytest.raises(
    ValueError, match=r'quant_conv\.bias.*loss\.weight.*\(9,\)'
  ):
    llamagen_vq.convert(CFG, broken)
