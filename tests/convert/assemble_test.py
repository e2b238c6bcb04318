"""What `assemble` makes of wrong tensors; case C22."""

import jax
import numpy as np
import pytest

from scar_jax.convert.common import Entry, assemble, flatten
from scar_jax.convert.readers import open_checkpoint
from scar_jax.convert.report import Report, current, recording
from scar_jax.streaming import Lazy

# The four tensors of the cases.
ABSTRACT = {
  'token': jax.ShapeDtypeStruct((12, 8), np.float32),
  'head': jax.ShapeDtypeStruct((8, 12), np.float32),
  'layers': {
    'norm': {'scale': jax.ShapeDtypeStruct((1, 8), np.float32)},
    'qkv': jax.ShapeDtypeStruct((1, 8, 24), np.float32),
  },
}
QKV = 'layers.{i}.attention.wqkv.weight'
TABLE = [
  Entry('token', ('tok_embeddings.weight',)),
  Entry('head', ('output.weight',), 'linear'),
  Entry('layers/norm/scale', ('layers.{i}.attention_norm.weight',)),
  Entry('layers/qkv', (QKV,), 'linear'),
]
SKIP = (r'freqs_cis',)


def read(path, **options):
  with recording(Report(**options)) as report:
    return assemble(TABLE, open_checkpoint(path), ABSTRACT, SKIP), report


def test_c22_reference_fits(case):
  params, report = read(case('c21_ref_fp32.safetensors'))
  assert report.counts()['used'] == 4
  state = open_checkpoint(case('c21_ref_fp32.safetensors'))
  np.testing.assert_array_equal(params['head'], state['output.weight'].T)
  assert current() is not report


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    (
      'missing',
      r"missing: \['output\.weight'\].*wanted output\.weight \(12, 8",
    ),
    (
      'unexpected',
      r"unexpected: \['cls_embedding\.uncond.*found cls.*\(3, 8\)",
    ),
    ('shape', r'tok_embeddings\.weight \(16, 8\) for token \(12, 8\)'),
    ('renamed', r'wqkv\.weight.*1 unexpected: .*attn\.qkv.*wanted.*found'),
    ('nan_weight', r"with NaN or infinity: \['layers\.0\.attention_norm"),
    ('transposed', r'wqkv\.weight \(8, 24\) for .*wanted \(24, 8\)'),
    ('cut_file', r'c22_cut_file\.safetensors is no whole safetensors file'),
  ],
)
@pytest.mark.parametrize('lazy', [True, False])
def test_c22_everything_wrong_is_an_error(case, name, message, lazy):
  with pytest.raises(ValueError, match=message):
    read(case(f'c22_{name}.safetensors'), lazy=lazy)


def test_c22_turned_matrices_of_two_axes_are_not_taken_as_they_are():
  state = {'w': np.zeros((8, 12), np.float32)}
  abstract = {'w': jax.ShapeDtypeStruct((8, 12), np.float32)}
  with pytest.raises(ValueError, match=r'w \(8, 12\) for w .*wanted \(12, 8\)'):
    assemble([Entry('w', ('w',), 'linear')], state, abstract)


def test_c22_partial_loading_only_by_flag_and_with_a_list(case):
  path = case('c22_missing.safetensors')
  params, report = read(path, allow_missing=True)
  assert report.drawn == ['head']
  assert 0.01 < params['head'].std() < 0.03
  again, _ = read(path, allow_missing=True, lazy=True)
  np.testing.assert_array_equal(np.asarray(again['head']), params['head'])
  assert '  drawn at random: head' in report.lines()
  assert '  missing output.weight (12, 8)' in report.lines()


def test_c22_extra_tensors_only_by_flag(case):
  path = case('c22_unexpected.safetensors')
  params, report = read(path, allow_unexpected=True)
  assert report.skipped == {'freqs_cis': (4, 2)}
  assert report.unexpected == {'cls_embedding.uncond_embedding': (3, 8)}
  assert sorted(flatten(params)) == sorted(e.path for e in TABLE)


def test_lazy_parameters_equal_the_others(case):
  path = case('c21_ref_fp32.safetensors')
  lazy, _ = read(path, lazy=True)
  arrays, _ = read(path)
  for name, leaf in flatten(lazy).items():
    assert isinstance(leaf, Lazy)
    want = flatten(arrays)[name]
    assert (leaf.shape, leaf.size, leaf.ndim) == (
      want.shape,
      want.size,
      want.ndim,
    )
    np.testing.assert_array_equal(np.asarray(leaf), want)
