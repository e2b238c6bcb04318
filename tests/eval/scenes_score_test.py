import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import gaussian

from scar_jax.data.sources import scenes
from scar_jax.data.sources.scenes import Item, Scene, Scenes, ScenesConfig
from scar_jax.eval.scenes import (
  MAX_PSNR,
  UNCLEAR,
  classify,
  closest_classes,
  score_scenes,
)


def _records(n=20, **cfg):
  source = Scenes(ScenesConfig(split='held_out', **cfg))
  return [source.load(i) for i in range(n)]


def _targets(records):
  return np.stack([r.target for r in records])


@pytest.mark.parametrize('size', [32, 48, 64])
def test_reads_every_class_on_every_background(size):
  cell = size // 4
  for background in range(3):
    for shape in scenes.SHAPES:
      items = tuple(
        Item(shape, colour, scenes.SIZES[row], row, col)
        for row in range(2)
        for col, colour in enumerate(list(scenes.COLOURS)[:4])
      )
      scene = Scene(items, background)
      found = classify(scenes.render(scene, 4, cell)[None])[0]
      np.testing.assert_array_equal(found, scenes.cell_classes(scene))


def test_truth_scores_one_and_source_scores_zero():
  records = _records()
  scores = score_scenes(_targets(records), records, _targets(records))
  assert scores['n'] == 20
  for name in ('exact', 'changed_exact', 'kept_exact', 'tokenizer_exact'):
    assert scores[name] == 1.0
  assert scores['background_psnr'] == MAX_PSNR
  assert scores['kinds']['move'] == {
    'n': 4,
    'exact': 1.0,
    'tokenizer_exact': 1.0,
  }
  sources = np.stack([r.condition for r in records])
  scores = score_scenes(sources, records)
  assert scores['exact'] == scores['changed_exact'] == 0.0
  assert scores['kept_exact'] == 1.0
  assert 'tokenizer_exact' not in scores


@pytest.mark.parametrize(
  'change',
  [
    dict(shape='cross'),
    dict(colour='blue'),
    dict(size='large'),
    dict(row=2),
    dict(col=2),
  ],
)
def test_one_wrong_property_is_not_exact(change):
  record = _records(1)[0]
  truth = Scene((Item('square', 'red', 'small', 1, 1),))
  record.target = scenes.render(truth)
  record.meta['cells'] = scenes.cell_classes(truth)
  wrong = Scene((truth.items[0]._replace(**change),))
  assert score_scenes(scenes.render(wrong)[None], [record])['exact'] == 0.0
  assert score_scenes(record.target[None], [record])['exact'] == 1.0


def test_damage_outside_the_changed_cell_lowers_kept_only():
  records = [r for r in _records(40) if r.meta['kind'] == 'recolour'][:1]
  image = _targets(records)
  row, col = np.argwhere((records[0].mask == 0) & (image[0] == 240).all(-1))[0]
  y, x = row // 8 * 8, col // 8 * 8
  image[0, y : y + 8, x : x + 8] = (220, 40, 40)
  scores = score_scenes(image, records)
  assert (scores['changed_exact'], scores['kept_exact']) == (1.0, 0.0)
  error = ((records[0].target - image[0].astype(float)) ** 2).sum()
  mse = error / ((records[0].mask == 0).sum() * 3)
  expected = 10 * np.log10(255**2 / mse)
  np.testing.assert_allclose(scores['background_psnr'], expected, rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.floats(0, 30), st.integers(0, 2**32 - 1))
def test_noise_up_to_30_grey_levels_stays_exact(i, sigma, seed):
  record = Scenes(ScenesConfig(split='held_out')).load(i)
  noise = np.random.default_rng(seed).normal(0, sigma, record.target.shape)
  image = np.clip(record.target + noise, 0, 255).astype(np.uint8)
  assert score_scenes(image[None], [record])['exact'] == 1.0


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.floats(0.01, 0.5))
def test_blur_up_to_half_a_pixel_stays_exact(i, sigma):
  record = Scenes(ScenesConfig(split='held_out')).load(i)
  image = gaussian(record.target, sigma, channel_axis=-1, preserve_range=True)
  image = np.round(image).astype(np.uint8)
  assert score_scenes(image[None], [record])['exact'] == 1.0


def test_smear_is_unclear():
  scene = Scene((Item('square', 'black', 'large', 1, 1),))
  image = scenes.render(scene)
  image = gaussian(image, 3, channel_axis=-1, preserve_range=True)
  cells = classify(np.round(image).astype(np.uint8)[None])[0]
  assert cells[5] == UNCLEAR


def test_classes_are_apart():
  assert closest_classes(8) > 40


def test_control_records_score_the_whole_picture():
  records = _records(6, kind='control')
  image = _targets(records)
  scores = score_scenes(image, records)
  assert set(scores['kinds']) == set(scenes.MAPS)
  assert scores['exact'] == 1.0
  image[0, 0, 0] = 0
  assert score_scenes(image, records)['background_psnr'] < MAX_PSNR


def test_refuses_what_does_not_fit():
  records = _records(2)
  with pytest.raises(ValueError, match='no records to score'):
    score_scenes(np.zeros((0, 32, 32, 3), np.uint8), [])
  with pytest.raises(ValueError, match=r'uint8 \(1, 32, 32, 3\); accepted: u'):
    score_scenes(_targets(records)[:1], records)
  with pytest.raises(ValueError, match=r'float64 .* accepted: uint8'):
    score_scenes(_targets(records) / 1.0, records)
  with pytest.raises(ValueError, match='30 pixels do not divide into 4 cells'):
    classify(np.zeros((1, 30, 30, 3), np.uint8))
