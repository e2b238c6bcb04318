import dataclasses

import jax
import numpy as np
import pytest

from scar_jax.convert import var
from scar_jax.convert.common import disassemble, flatten
from scar_jax.models.decoder import decoder_size
from scar_jax.models.prefill import PrefixConfig
from scar_jax.orders import PATCH_NUMS

NAMES = ('var', 'var_shared_aln', 'var_noqknorm')


@pytest.mark.parametrize('name', NAMES)
def test_every_tensor_is_used_and_comes_back(golden, name):
  state, _ = golden(name)
  cfg = var.detect(state, heads=4)
  params = var.convert(cfg, state)
  qkv = state['blocks.1.attn.mat_qkv.weight'].reshape(3, 4, 8, 32)
  np.testing.assert_array_equal(
    params['decoder']['layers']['attn']['qkv']['kernel'][1],
    qkv.transpose(3, 0, 1, 2),
  )
  back = var.reverse(cfg, params) | var.buffers(cfg)
  # The constants too: the reference's strict loading takes the file.
  assert set(back) == set(state)
  for key, value in back.items():
    np.testing.assert_array_equal(value, state[key], err_msg=key)
    assert value.dtype == state[key].dtype
  again = var.convert(cfg, back)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_config_is_found_in_the_tensors(golden):
  state, _ = golden('var')
  cfg = var.detect(state, tokenizer='vae')
  decoder = cfg.model.decoder
  assert (decoder.width, decoder.layers, decoder.heads) == (32, 2, 4)
  assert decoder.hidden == 64
  assert decoder.qk_norm
  assert not decoder.shared_ada
  assert cfg.model.patch_nums == (1, 2, 3, 4)
  assert cfg.model.text.classes == 10
  assert cfg.model.latent_dim == 16
  assert (cfg.image_size, cfg.tokenizer) == (64, 'vae')
  assert var.size(cfg) == 'custom'
  assert var.artifact(cfg, {}) == ('scar', cfg, {})
  assert var.detect(golden('var_shared_aln')[0]).model.decoder.shared_ada
  plain = golden('var_noqknorm')[0]
  assert not var.detect(plain, heads=4).model.decoder.qk_norm


def test_what_cannot_be_detected_is_asked_for(golden):
  plain, _ = golden('var_noqknorm')
  with pytest.raises(ValueError, match=r'width 32 .*accepted: a divisor'):
    var.detect(plain)
  state, _ = golden('var')
  del state['word_embed.weight']
  with pytest.raises(ValueError, match=r"missing: \['word_embed.weight'\]"):
    var.detect(state)
  state['lvl_embed.weight'] = np.zeros((3, 32))
  with pytest.raises(ValueError, match=r'3 scales of 30 positions.*patch_nums'):
    var.detect(state)


@pytest.mark.parametrize(
  ('size', 'pixels', 'billions'),
  [
    ('d16', 256, '0.31'),
    ('d20', 256, '0.60'),
    ('d24', 256, '1.0'),
    ('d30', 256, '2.0'),
  ],
)
def test_named_sizes_are_the_published_ones(size, pixels, billions):
  _, count = _full_size(size, pixels)
  digits = len(billions.split('.')[1])
  assert f'{count / 1e9:.{digits}f}' == billions


def test_the_512_pixel_model_is_the_published_one():
  _, count = _full_size('d36', 512)
  # 2.3B in the paper's table, which has no more digits.
  assert abs(count / 1e9 - 2.3) < 0.1


def _full_size(size, pixels):
  """Table, detection and parameter count of a named size."""
  model = var.model_config(decoder_size(size), PATCH_NUMS[pixels])
  abstract = var.abstract_params(model)
  ours = [entry.path for entry in var.table(model)]
  leaves = flatten(abstract)
  assert sorted(ours) == sorted(leaves)
  zeros = jax.tree.map(
    lambda x: np.broadcast_to(np.float32(0), x.shape), abstract
  )
  # What a file of that size would hold is recognised as that size.
  state = disassemble(var.table(model), zeros)
  found = var.detect(state)
  assert found.model == model
  assert found.image_size == pixels
  assert var.size(found) == size
  return model, sum(x.size for x in leaves.values())


def test_only_plain_scale_models_have_names(golden):
  model = var.detect(golden('var')[0]).model
  prefix = PrefixConfig('full', grid=(4, 4), width=6, out=32)
  with pytest.raises(ValueError, match=r"'scale', prefix.compress='full'"):
    var.table(dataclasses.replace(model, prefix=prefix))


def test_missing_unexpected_and_misshapen_tensors_are_listed(golden):
  state, _ = golden('var')
  cfg = var.detect(state)
  state['pos_1LC'] = state['pos_1LC'][:, :5]
  state['more'] = state.pop('head.bias')
  with pytest.raises(
    ValueError, match=r'head\.bias.*more.*pos_1LC \(1, 5, 32\)'
  ):
    var.convert(cfg, state)
