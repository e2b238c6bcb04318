"""Files, number types, prefixes and containers of checkpoints; case C21."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scar_jax.convert import files
from scar_jax.convert.readers import Renamed, open_checkpoint

NAMES = {
  'layers.0.attention.wqkv.weight',
  'layers.0.attention_norm.weight',
  'output.weight',
  'tok_embeddings.weight',
}
PREFIXED = ('_orig_mod', 'gpt_model', 'model', 'module', 'module_orig_mod')


@pytest.fixture
def reference(case):
  return load_file(case('c21_ref_fp32.safetensors'))


def same(state, want):
  assert set(state) == set(want)
  for name, value in want.items():
    assert state[name].dtype == np.float32
    np.testing.assert_array_equal(state[name], value)


@pytest.mark.parametrize('prefix', PREFIXED)
def test_c21_prefixes_are_removed_and_told(case, reference, prefix):
  state = open_checkpoint(case(f'c21_prefix_{prefix}.safetensors'))
  same(state, reference)
  assert any('removed the prefix' in note for note in state.notes)
  assert state.shapes['output.weight'].shape == (12, 8)


def test_c21_narrow_types_widen_exactly(case, reference):
  state = open_checkpoint(case('c21_fp16.safetensors'))
  half = load_file(case('c21_fp16.safetensors'))
  same(state, {k: v.astype(np.float32) for k, v in half.items()})
  path = case('c21_bf16.safetensors')
  state = open_checkpoint(path)
  raw = path.read_bytes()
  (length,) = struct.unpack('<Q', raw[:8])
  header = json.loads(raw[8 : 8 + length])
  for name in NAMES:
    # The upper half of a float32 is a bfloat16.
    begin, end = (8 + length + n for n in header[name]['data_offsets'])
    bits = np.frombuffer(raw[begin:end], np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(
      state[name].reshape(-1), bits.view(np.float32)
    )
    np.testing.assert_allclose(state[name], reference[name], rtol=2**-7)


def test_c21_a_prefix_on_some_tensors_is_refused(case, tmp_path):
  with pytest.raises(ValueError, match=r"2 tensors have the prefix 'module\.'"):
    open_checkpoint(case('c21_prefix_mixed.safetensors'))
  path = tmp_path / 'twins.safetensors'
  one = np.ones(1, np.float32)
  save_file({'module.a': one, 'a': one, 'b': one}, path)
  with pytest.raises(ValueError, match='without it a would occur twice'):
    open_checkpoint(path)


def test_c21_model_is_a_name_unless_all_have_it(tmp_path):
  path = tmp_path / 'some.safetensors'
  one = np.ones(1, np.float32)
  save_file({'model.a': one, 'lm_head': one}, path)
  assert set(open_checkpoint(path)) == {'model.a', 'lm_head'}


def test_c21_average_or_plain_weights(case, reference):
  path = case('c21_with_ema.safetensors')
  half = {k: np.float32(0.5) * v for k, v in reference.items()}
  same(open_checkpoint(path), half)
  same(open_checkpoint(path, 'ema'), half)
  plain = open_checkpoint(path, 'model')
  same(plain, reference)
  assert "took the weights 'model', left 'ema'" in plain.notes[0]
  with pytest.raises(ValueError, match=r'--weights=ema; accepted here: model'):
    open_checkpoint(case('c21_ref_fp32.safetensors'), 'ema')
  with pytest.raises(ValueError, match="'best'; accepted: auto, ema, model"):
    open_checkpoint(path, 'best')


def test_nothing_is_read_before_it_is_asked_for(case, monkeypatch):
  reads = []
  span = files._span

  def spy(*args):
    read = span(*args)
    return lambda: reads.append(args) or read()

  monkeypatch.setattr(files, '_span', spy)
  state = open_checkpoint(case('c21_prefix_model.safetensors'))
  lower = Renamed(state, lambda n: None if 'norm' in n else n.upper())
  assert 'OUTPUT.WEIGHT' in lower
  assert lower.shapes['OUTPUT.WEIGHT'].shape == (12, 8)
  assert len(lower) == 3
  assert not reads
  assert lower['OUTPUT.WEIGHT'].shape == (12, 8)
  assert len(reads) == 1
  with pytest.raises(ValueError, match='two tensors of one name'):
    Renamed(state, lambda n: 'x')


def write_index(folder, shards, where=None):
  where = where or {n: file for file, part in shards.items() for n in part}
  for file, part in shards.items():
    save_file({n: np.full(2, len(n), np.float32) for n in part}, folder / file)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': where}))
  return index


def test_shards_are_one_checkpoint(tmp_path):
  shards = {'a.safetensors': ['x', 'yy'], 'b.safetensors': ['zzz']}
  index = write_index(tmp_path, shards)
  for path in (index, tmp_path):
    state = open_checkpoint(path)
    assert {n: state[n][0] for n in state} == {'x': 1, 'yy': 2, 'zzz': 3}


@pytest.mark.parametrize(
  ('where', 'message'),
  [
    ({'x': 'b.safetensors'}, r"'b\.safetensors', which is not beside it"),
    ({'x': '../a.safetensors'}, 'all shards in the folder of the index'),
    (
      {'x': 'a.safetensors', 'y': 'a.safetensors'},
      r"disagree: \['y'\] missing",
    ),
    ({}, 'holds no weights: 0 tensors'),
  ],
)
def test_indices_that_do_not_fit(tmp_path, where, message):
  index = write_index(tmp_path, {'a.safetensors': ['x']}, where or {'': 0})
  if not where:
    index.write_text('{"weight_map": {}}')
  with pytest.raises(ValueError, match=message):
    open_checkpoint(index)
  index.write_text('[]')
  with pytest.raises(ValueError, match='no index of shards'):
    open_checkpoint(index)


def raw_safetensors(path, header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)
  return path


@pytest.mark.parametrize(
  ('header', 'message'),
  [
    (b'{"a": 1, "a": 2}', r"names \['a'\] occur twice"),
    (b'nonsense', 'its header cannot be read'),
    ({'a': {'dtype': 'F32'}}, 'its header cannot be read'),
    (
      {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}},
      r'a \(2,\) of F32 has 4 bytes',
    ),
    (
      {'a': {'dtype': 'F8_E4M3', 'shape': [1], 'data_offsets': [0, 1]}},
      'has the type F8_E4M3; accepted: F64',
    ),
  ],
)
def test_damaged_safetensors(tmp_path, header, message):
  path = raw_safetensors(tmp_path / 'x.safetensors', header, b'1234')
  with pytest.raises(ValueError, match=message):
    open_checkpoint(path)


def test_a_pointer_file_is_no_checkpoint(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_text('version https://git-lfs.github.com/spec/v1\n')
  with pytest.raises(ValueError, match='pointer to large storage'):
    open_checkpoint(path)


def test_places_that_hold_no_checkpoint(tmp_path):
  with pytest.raises(ValueError, match='no such file'):
    open_checkpoint(tmp_path / 'x.pt')
  with pytest.raises(ValueError, match=r'a directory with \[\]; accepted'):
    open_checkpoint(tmp_path)
  (tmp_path / 'x.h5').write_bytes(b'')
  with pytest.raises(ValueError, match=r"ending '\.h5'; accepted: \.safet"):
    open_checkpoint(tmp_path / 'x.h5')
