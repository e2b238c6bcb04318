"""Pixel metrics against torchmetrics' numbers in the fixture `metrics`."""

import numpy as np
import pytest

from scar_jax.eval.metrics import pixels


@pytest.fixture(scope='module')
def arrays(golden):
  return golden('metrics')[1]


@pytest.mark.parametrize('part', ['', '_unedit_part', '_edit_part'])
def test_psnr_mse_ssim_as_pie_bench(arrays, part):
  mask = arrays['pie_mask'][..., None].astype(bool)
  keep = {'': ~mask | mask, '_unedit_part': ~mask, '_edit_part': mask}[part]
  a, b = (
    arrays[n].astype(np.float32) / 255 * keep
    for n in ('pie_source', 'pie_edited')
  )
  for name in ('psnr', 'mse'):
    want = float(arrays[f'pie_{name}{part}'])
    assert getattr(pixels, name)(a, b) == pytest.approx(want, rel=1e-4)
  assert pixels.ssim(a, b) == pytest.approx(
    float(arrays[f'pie_ssim{part}']), abs=2e-5
  )
  if part == '_unedit_part':
    want = float(arrays['pie_ssim_unedit_part_valid'])
    assert pixels.ssim(a, b, valid=True) == pytest.approx(want, abs=2e-5)


@pytest.mark.parametrize('i', range(3))
def test_ssim_and_ms_ssim(arrays, i):
  a, b = arrays['ssim_a'][i], arrays['ssim_b'][i]
  found = pixels.ssim(a, b), pixels.ssim(a, b, True), pixels.ms_ssim(a, b)
  want = [arrays[n][i] for n in ('ssim', 'ssim_valid', 'ms_ssim')]
  np.testing.assert_allclose(found, want, atol=2e-5)


def test_equal_pictures_score_the_most():
  a = np.arange(192, dtype=np.uint8).reshape(16, 12)
  assert pixels.psnr(a, a) == pixels.MAX_PSNR
  assert pixels.ssim(a, a) == pytest.approx(1)


def test_what_cannot_be_compared_is_said():
  small = np.zeros((8, 20), np.uint8)
  with pytest.raises(ValueError, match=r'\(8, 20\) and \(20, 8\); accepted'):
    pixels.mse(small, small.T)
  with pytest.raises(ValueError, match='20x8 pixels; accepted: sides of 11'):
    pixels.ssim(small, small)
  with pytest.raises(ValueError, match='accepted: sides of 161 or more'):
    pixels.ms_ssim(small, small)
