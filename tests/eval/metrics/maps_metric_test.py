"""Consistency of control maps against the fixture `metrics`."""

import numpy as np
import pytest

from scar_jax.data.controls import canny
from scar_jax.eval.metrics import maps


@pytest.fixture(scope='module')
def arrays(golden):
  return golden('metrics')[1]


def test_canny_f1(arrays):
  for i in range(3):
    edges = []
    for side in 'ab':
      found = canny(arrays[f'canny_images_{side}'][i])[..., 0]
      np.testing.assert_array_equal(found, arrays[f'canny_edges_{side}'][i])
      edges.append(found > 0)
    f1 = maps.binary_f1(edges[1], edges[0])
    assert f1 == pytest.approx(float(arrays['canny_f1'][i]), rel=1e-4)
  empty = np.zeros((4, 4), bool)
  assert maps.binary_f1(empty, empty) == float(arrays['canny_f1_both_empty'])


def test_depth_rmse(arrays):
  found = [
    maps.depth_rmse(b, a)
    for a, b in zip(arrays['depth_a'], arrays['depth_b'], strict=True)
  ]
  np.testing.assert_allclose(found, arrays['depth_rmse'], rtol=1e-6)
  assert maps.depth_rmse(np.zeros((2, 2)), np.zeros((2, 2))) == 0


@pytest.mark.parametrize('ignore', [0, 255])
def test_iou_over_the_whole_set(arrays, ignore):
  labels = arrays[f'seg_label_ignore{ignore}']
  counts = sum(
    maps.confusion(p, q, 6, ignore)
    for p, q in zip(arrays['seg_pred'], labels, strict=True)
  )
  want = arrays[f'seg_confusion_ignore{ignore}']
  np.testing.assert_array_equal(counts, want)
  iou = maps.class_iou(counts, ignore)
  np.testing.assert_allclose(
    np.nan_to_num(iou, nan=-1), arrays[f'seg_iou_ignore{ignore}'], rtol=1e-6
  )
  mean = float(arrays[f'seg_miou_ignore{ignore}'])
  assert maps.mean_iou(counts, ignore) == pytest.approx(mean, rel=1e-6)


def test_labels_out_of_range_and_two_shapes_are_errors():
  good = np.zeros((2, 3), int)
  with pytest.raises(ValueError, match='found labels from 7 to 7; accepted'):
    maps.confusion(good + 7, good, 6)
  with pytest.raises(ValueError, match=r'\(2, 3\) and \(3, 2\)'):
    maps.binary_f1(good, good.T)
