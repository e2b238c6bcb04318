"""Frechet distance against the ADM evaluator's numbers in `metrics`."""

import json

import numpy as np
import pytest

from scar_jax.eval.metrics import frechet


@pytest.fixture(scope='module')
def arrays(golden):
  return golden('metrics')[1]


def test_distance_and_statistics(arrays):
  a, b = (frechet.statistics(arrays[f'fid_{s}']) for s in 'ab')
  np.testing.assert_allclose(a.mean, arrays['fid_mu_a'], rtol=1e-9)
  np.testing.assert_allclose(b.cov, arrays['fid_sigma_b'], rtol=1e-6)
  found = frechet.frechet_distance(a, b)
  assert found == pytest.approx(float(arrays['fid']), rel=1e-5)
  assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_singular_covariances(arrays):
  a, b = (frechet.statistics(arrays[f'fid_{s}'][:10]) for s in 'ab')
  found = frechet.frechet_distance(a, b)
  assert found == pytest.approx(float(arrays['fid_first10']), rel=1e-5)


def test_batches_give_what_the_whole_gives(arrays):
  # A mean far from zero would cost digits if sums of squares were kept.
  x = arrays['fid_a'].astype(np.float64) + 1e4
  moments = frechet.Moments()
  for start in (0, 50, 51):
    moments.add(x[start : {0: 50, 50: 51, 51: 120}[start]])
  found = moments.statistics()
  assert found.n == 120
  np.testing.assert_allclose(found.mean, x.mean(0))
  np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-7)


def test_files(tmp_path, arrays):
  path = tmp_path / 'made' / 'reference.npz'
  a = frechet.statistics(arrays['fid_a'])
  frechet.write_statistics(path, a)
  again = frechet.read_statistics(path)
  assert frechet.frechet_distance(a, again) == pytest.approx(0, abs=1e-6)
  assert again.n == 120
  np.savez(tmp_path / 'other.npz', arr_0=np.zeros(3))
  with pytest.raises(ValueError, match=r'arrays arr_0; accepted: \.npz with'):
    frechet.read_statistics(tmp_path / 'other.npz')
  (tmp_path / 'text.npz').write_text(json.dumps({}))
  with pytest.raises(ValueError, match=r'accepted: \.npz with mu'):
    frechet.read_statistics(tmp_path / 'text.npz')
  with pytest.raises(ValueError, match='of 16 and 2 features'):
    frechet.frechet_distance(a, frechet.statistics(np.eye(2)))
