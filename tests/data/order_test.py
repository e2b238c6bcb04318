"""The sample stream: a permutation in each epoch, from any place."""

import numpy as np
import pytest

from scar_jax.data.order import (
  MIX_BLOCK,
  mixed_at,
  mixed_epochs,
  places_of,
  records_at,
  shares_of,
)

GOLDEN = [4, 6, 8, 9, 0, 2, 5, 7, 3, 1, 9, 0]


@pytest.mark.parametrize('count', [1, 2, 3, 9, 64, 1000])
@pytest.mark.parametrize('seed', [0, -1, 2**70])
def test_each_epoch_is_a_permutation(count, seed):
  stream = records_at(np.arange(3 * count), count, seed)
  for epoch in stream.reshape(3, count):
    assert sorted(epoch) == list(range(count))


def test_epochs_and_seeds_differ_and_repeat():
  places = np.arange(200)
  a = records_at(places, 100, 5)
  assert (a == records_at(places, 100, 5)).all()
  assert (a[:100] != a[100:]).any()
  assert (a != records_at(places, 100, 6)).any()
  # Any part of the stream, alone.
  assert (records_at(np.arange(93, 107), 100, 5) == a[93:107]).all()
  unshuffled = records_at(places, 100, 5, shuffle=False)
  assert (unshuffled == np.arange(200) % 100).all()


def test_the_stream_does_not_change_between_versions():
  # Resuming a run with a newer scar_jax relies on these numbers. They may be
  # updated only together with a note in the changelog.
  found = records_at(np.arange(12), 10, seed=0).tolist()
  assert found == GOLDEN


def test_every_record_comes_at_every_place():
  count = 8
  stream = records_at(np.arange(2000 * count), count, 1).reshape(-1, count)
  counts = np.stack(
    [np.bincount(column, minlength=count) for column in stream.T]
  )
  assert counts.min() > 180  # 250 are expected, with a deviation of 15
  assert counts.max() < 320


def test_large_sources_need_no_table():
  places = np.array([0, 10**12, 10**15])
  found = records_at(places, 20_000_000_000, 3)
  assert (found >= 0).all()
  assert (found < 20_000_000_000).all()


@pytest.mark.parametrize(
  ('weights', 'shares'),
  [
    ((0.7, 0.3), (700, 300)),
    ((1, 1, 1), (334, 333, 333)),
    ((1e-9, 5), (1, 999)),
    ((2.0,), (1000,)),
  ],
)
def test_shares_are_whole_and_sum_up(weights, shares):
  assert shares_of(weights) == shares


@pytest.mark.parametrize('weights', [(), (1, 0), (1, -1), (float('nan'), 1)])
def test_weights_that_are_none(weights):
  with pytest.raises(ValueError, match=r'data\.mixture; accepted: .* > 0'):
    shares_of(weights)


def test_a_mixture_has_its_shares_and_every_record_of_a_part_once():
  counts, shares = (70, 900, 13), shares_of((0.5, 0.3, 0.2))
  stream = mixed_at(np.arange(4 * MIX_BLOCK), counts, shares, 5)
  parts = np.searchsorted(np.cumsum(counts), stream, side='right')
  for block in parts.reshape(4, MIX_BLOCK):
    assert np.bincount(block).tolist() == [500, 300, 200]
  # 2000 draws of 70 records: each 28 or 29 times; 1200 of 900: 1 or 2.
  seen = np.bincount(stream, minlength=sum(counts))
  for part, wanted in enumerate((28, 1, 61)):
    own = seen[sum(counts[:part]) : sum(counts[: part + 1])]
    assert set(own.tolist()) <= {wanted, wanted + 1}
  # Any part of the stream, alone; blocks differ; so do seeds.
  some = mixed_at(np.arange(990, 1010), counts, shares, 5)
  assert (some == stream[990:1010]).all()
  assert (parts[:MIX_BLOCK] != parts[MIX_BLOCK : 2 * MIX_BLOCK]).any()
  assert (stream != mixed_at(np.arange(4000), counts, shares, 6)).any()


@pytest.mark.parametrize('count', [1, 3, 64, 1000])
def test_the_place_of_a_record_in_an_epoch(count):
  records = np.arange(count)[::-1]
  for epoch in (0, 1, 7):
    places = places_of(records, count, 5, epoch)
    assert set(places // count) == {epoch}
    assert (records_at(places, count, 5) == records).all()


def test_epochs_of_the_parts_of_a_mixture():
  counts, shares = (3, 50), (250, 750)
  places = np.arange(5000)
  records = mixed_at(places, counts, shares, 1)
  epochs = mixed_epochs(places, counts, shares, 1)
  # No record comes twice in an epoch of its part.
  pairs = set(zip(records.tolist(), epochs.tolist(), strict=True))
  assert len(pairs) == len(places)
  assert epochs[records < 3].max() == 250 * 5 // 3 - (250 * 5 % 3 == 0)
  assert epochs[records >= 3].max() == 750 * 5 // 50 - 1
