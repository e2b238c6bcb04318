"""PIE-Bench's protocol, and structure distance, against `metrics`."""

import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.eval.metrics import pie
from scar_jax.eval.metrics.structure import key_distance, self_similarity


@pytest.fixture(scope='module')
def arrays(golden):
  return golden('metrics')[1]


class _Clip:
  """Notes what it was shown."""

  def __call__(self, pictures, text):
    self.seen, self.text = pictures, text
    return [20.0, 30.0]


def _pair(arrays):
  mask = arrays['pie_mask'].astype(bool)
  return arrays['pie_source'], arrays['pie_edited'], mask


def test_background_is_compared_over_the_whole_picture(arrays):
  scores = pie.score_pair(*_pair(arrays), 'a cat')
  assert list(scores) == ['psnr', 'mse', 'ssim']
  for name, value in scores.items():
    want = float(arrays[f'pie_{name}_unedit_part'])
    assert value == pytest.approx(want, rel=1e-4)


def test_the_edited_part_is_black_outside(arrays):
  source, edited, mask = _pair(arrays)
  clip = _Clip()
  scores = pie.score_pair(
    source, edited, mask, 'a cat', pie.Networks(clip=clip)
  )
  whole, part = clip.seen
  np.testing.assert_array_equal(whole, edited)
  np.testing.assert_array_equal(part[mask], edited[mask])
  assert part.dtype == np.uint8
  assert not part[~mask].any()
  assert (scores['clip_whole'], scores['clip_edited']) == (20, 30)
  assert pie.Networks(clip=clip).missing == ('structure', 'lpips')


def test_nothing_to_compare_is_skipped_in_the_mean(arrays):
  source, edited, mask = _pair(arrays)
  full = pie.score_pair(source, edited, np.ones_like(mask), '')
  assert np.isnan(full['psnr'])
  row = pie.score_pair(source, edited, mask, '')
  means = pie.mean_scores([full, row])
  assert means['mse'] == pytest.approx(row['mse'] * 1e4)
  assert means['ssim'] == pytest.approx(row['ssim'] * 1e2)
  assert np.isnan(pie.mean_scores([full])['psnr'])
  with pytest.raises(ValueError, match='accepted: one size'):
    pie.score_pair(source, edited[1:], mask, '')


def _keys(qkv):
  """Heads concatenated, [B, tokens, D], of a fused projection."""
  b, tokens, width = qkv.shape
  return jnp.asarray(qkv.reshape(b, tokens, 3, width // 3)[:, :, 1])


def test_structure_of_fused_projections(arrays):
  a, b = (_keys(arrays[f'struct_qkv_{s}']) for s in 'ab')
  for keys, side in ((a, 'a'), (b, 'b')):
    want = arrays[f'struct_sim_{side}']
    np.testing.assert_allclose(self_similarity(keys), want, atol=1e-5)
  want = float(arrays['struct_distance'])
  assert float(key_distance(a, b)[0]) == pytest.approx(want, rel=1e-4)


def test_a_zero_key_is_similar_to_none(arrays):
  found = self_similarity(jnp.asarray(arrays['struct_keys_zero']))
  np.testing.assert_allclose(found, arrays['struct_sim_zero'], atol=1e-5)
  assert np.isfinite(found).all()
