import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.convert import var_vqvae
from scar_jax.convert.common import disassemble, flatten
from scar_jax.models.tokenizers import residual
from scar_jax.models.tokenizers.msvq import MSVQModel
from scar_jax.models.tokenizers.msvq_config import MSVQConfig, msvq_config
from scar_jax.orders import PATCH_NUMS

CFG = MSVQConfig(
  codes=64, code_dim=16, patch_nums=(1, 2, 3, 4), ch=32, ch_mult=(1, 1, 1, 2, 1)
)


def test_every_tensor_is_used_and_comes_back(golden):
  state, _ = golden('var_vqvae')
  params = var_vqvae.convert(CFG, state)
  qkv = state['encoder.mid.attn_1.qkv.weight']
  np.testing.assert_array_equal(
    params['encoder']['mid_1']['k']['kernel'][0, 0], qkv[32:64, :, 0, 0].T
  )
  back = disassemble(var_vqvae.table(CFG), params)
  assert set(state) - set(back) == {var_vqvae.HITS}
  for name, value in back.items():
    np.testing.assert_array_equal(value, state[name])
  back = var_vqvae.reverse(CFG, params) | var_vqvae.buffers(CFG)
  assert {n: x.shape for n, x in back.items()} == {
    n: x.shape for n, x in state.items()
  }
  again = var_vqvae.convert(CFG, back)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_config_is_found_in_the_tensors(golden):
  state, _ = golden('var_vqvae')
  assert var_vqvae.detect(state, (1, 2, 3, 4)) == CFG
  with pytest.raises(ValueError, match=r'4 scales, whose sides .*10 or 14'):
    var_vqvae.detect(state)
  with pytest.raises(ValueError, match=r'\(1, 2\).*accepted: 4 sides'):
    var_vqvae.detect(state, (1, 2))
  assert var_vqvae.size(CFG) == 'custom'
  state['encoder.down.1.block.0.conv1.weight'] = np.zeros((33, 32, 3, 3))
  with pytest.raises(ValueError, match=r'widths \[32, 33, 32.*first, 32'):
    var_vqvae.detect(state, (1, 2, 3, 4))
  del state['encoder.conv_in.weight']
  with pytest.raises(ValueError, match=r"missing: \['encoder.conv_in.weight"):
    var_vqvae.detect(state)


def test_what_var_cannot_run_does_not_go_back():
  with pytest.raises(ValueError, match=r'groups=16.*accepted: 32, True'):
    var_vqvae.reverse(dataclasses.replace(CFG, groups=16), {})


@pytest.mark.parametrize('pixels', [256, 1024])
def test_the_table_covers_the_full_sizes(pixels):
  cfg = msvq_config(f'var{pixels}')
  abstract = var_vqvae.abstract_params(cfg)
  ours = [entry.path for entry in var_vqvae.table(cfg)]
  assert sorted(ours) == sorted(flatten(abstract))
  # What a file of that size would hold is recognised as that size.
  zeros = jax.tree.map(
    lambda x: np.broadcast_to(np.float32(0), x.shape), abstract
  )
  state = disassemble(var_vqvae.table(cfg), zeros) | var_vqvae.buffers(cfg)
  assert var_vqvae.detect(state) == cfg
  assert var_vqvae.size(cfg) == f'var{pixels}'
  assert var_vqvae.detect(state, PATCH_NUMS[pixels]) == cfg


@pytest.mark.parametrize('phis', [1, 2])
def test_other_numbers_of_phi_modules_have_names(phis):
  cfg = dataclasses.replace(CFG, phis=phis)
  zeros = jax.tree.map(
    lambda x: np.zeros(x.shape, np.float32), var_vqvae.abstract_params(cfg)
  )
  state = disassemble(var_vqvae.table(cfg), zeros)
  assert sum('quant_resi' in name for name in state) == 2 * phis
  assert var_vqvae.detect(state, (1, 2, 3, 4)) == cfg


@pytest.mark.parametrize('mistake', ['phi', 'bicubic', 'area'])
def test_a_wrong_rule_of_the_scales_shows(golden, mistake, monkeypatch):
  state, a = golden('var_vqvae')
  if mistake == 'phi':
    monkeypatch.setattr(residual, 'phi_picks', lambda s, k: (1, 0, 2, 3))
  else:
    resize = residual.resize

    def wrong(x, size, mode):
      return resize(x, size, 'bilinear' if mode == mistake else mode)

    monkeypatch.setattr(residual, 'resize', wrong)
  params = var_vqvae.convert(CFG, state)
  latent = jnp.asarray(a['latent'].transpose(0, 2, 3, 1))
  quantize = functools.partial(MSVQModel(CFG).apply, method='quantize')
  _, partial = jax.jit(quantize)({'params': params}, latent)
  expected = a['f_hat_3'].transpose(0, 2, 3, 1)
  assert np.abs(partial[-1] - expected).max() > 1e-2


def test_missing_unexpected_and_misshapen_tensors_are_listed(golden):
  state, _ = golden('var_vqvae')
  broken = {**state, 'loss.weight': np.zeros(1)}
  del broken['quant_conv.bias']
  broken['decoder.mid.attn_1.qkv.bias'] = np.zeros(9, np.float32)
  with pytest.raises(
    ValueError, match=r'quant_conv\.bias.*loss\.weight.*qkv\.bias \(9,\)'
  ):
    var_vqvae.convert(CFG, broken)
