"""Batches of one shape: their order, what they hold, and the survey."""

import io
import itertools
import json
import pickle

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scar_jax.data.buckets import (
  Buckets,
  make_buckets,
  store_sizes,
  stored_sizes,
  survey_sizes,
)
from scar_jax.data.controls import Controlled
from scar_jax.data.order import batch_of_group
from scar_jax.data.pipeline import make_loader
from scar_jax.data.records import Record, RecordError
from scar_jax.data.transforms import decode, header_size

SIZES = ((8, 8), (4, 16), (16, 4))


class Ramps:
  """Record i is twice a size of `SIZES`: 0 on the left, 255 on the right."""

  def __init__(self, count=29, bad=(), first=0):
    self.count, self.bad, self.first = count, bad, first

  def __len__(self):
    return self.count

  def describe(self):
    return f'{self.count} ramps'

  def size(self, i):
    if i in self.bad:
      raise RecordError(f'row {i}', 'no header')
    height, width = SIZES[(i + self.first) % 5 % 3]
    return 2 * height, 2 * width

  def load(self, i, rng):
    height, width = self.size(i)
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    picture = np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()
    picture[:2] = i
    return Record(picture, picture[::-1], '', label=i, key=f'row {i}')


def loader(source=None, batch=4, **more):
  source = Ramps() if source is None else source
  buckets = make_buckets(survey_sizes(source), SIZES)
  more = {'max_bad_share': 1.0} | more
  return make_loader(source, None, batch, 8, buckets=buckets, **more)


def take(it, n):
  return [next(it) for _ in range(n)]


@settings(deadline=None, max_examples=20)
@given(
  st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
  st.integers(1, 9),
  st.integers(0, 3),
)
def test_groups_keep_pace_and_lose_nothing(counts, batch, seed):
  total, epochs = sum(counts), 3
  begun = [sum(-(-e * n // batch) for n in counts) for e in range(epochs + 1)]
  places = [[] for _ in counts]
  for epoch in range(epochs):
    for number in range(begun[epoch], begun[epoch + 1]):
      group, found = batch_of_group(number, counts, batch, seed)
      assert len(found) == batch
      assert found[0] % batch == 0
      # It begins in this epoch of its group.
      assert found[0] // counts[group] == epoch
      places[group] += found.tolist()
  for found, count in zip(places, counts, strict=True):
    # All places in order of time, each once: the epochs and a part of a batch.
    assert sorted(found) == list(range(-(-epochs * count // batch) * batch))
  assert abs(begun[-1] * batch - epochs * total) < batch * len(counts) + 1


def test_batches_of_an_epoch_are_mixed():
  groups = [batch_of_group(k, (400, 400), 8, 0)[0] for k in range(200)]
  changes = sum(a != b for a, b in itertools.pairwise(groups))
  assert 30 < changes < 170
  other = [batch_of_group(k, (400, 400), 8, 1)[0] for k in range(200)]
  assert groups != other
  assert groups[:100] != groups[100:]


def test_a_batch_has_one_shape_and_an_epoch_each_record_once():
  source, seen = Ramps(), {}
  for batch in take(loader(source, seed=2), 40):
    shape = batch['target'].shape
    assert shape == batch['condition'].shape
    assert shape[1:3] in SIZES
    assert batch['valid'].all()
    for i in batch['index'].tolist():
      assert source.size(i) == (2 * shape[1], 2 * shape[2])
      seen.setdefault(shape[1:3], []).append(i)
  assert set(seen) == set(SIZES)
  for size, records in seen.items():
    mine = [i for i in range(29) if source.size(i)[0] == 2 * size[0]]
    # The stream of a bucket is its epochs, whatever else comes between; here
    # they come in batches that an epoch has mixed.
    assert set(np.bincount(records, minlength=29)[mine]) <= {4, 5, 6, 7}


def test_pictures_are_not_squashed_nor_cut():
  for batch in take(loader(seed=1), 12):
    _, height, width, _ = batch['target'].shape
    pixels = (batch['target'] + 1) * 127.5
    assert np.allclose(pixels[:, 0, 0, 0], batch['index'], atol=1)
    # From one edge of the picture to the other, along its own width.
    row = pixels[:, height // 2, :, 0]
    wanted = np.linspace(0, 255, 2 * width).reshape(width, 2).mean(1)
    assert np.allclose(row, wanted, atol=255 / width)
    turned = (batch['condition'][:, ::-1] + 1) * 127.5
    assert np.allclose(turned, pixels, atol=1)


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_share_one_stream_of_shapes(hosts):
  whole = take(loader(seed=1), 9)
  parts = [
    take(loader(seed=1, process_index=p, process_count=hosts), 9)
    for p in range(hosts)
  ]
  for wanted, found in zip(whole, zip(*parts, strict=True), strict=True):
    for name, value in wanted.items():
      joined = np.concatenate([part[name] for part in found])
      np.testing.assert_array_equal(joined, value, err_msg=name)


@pytest.mark.parametrize('done', [0, 1, 5, 8])
def test_resume_is_exact_from_any_place(done):
  whole = take(loader(seed=3, crop_ratio=1.5), 10)
  first = loader(seed=3, crop_ratio=1.5)
  take(first, done)
  state = json.loads(json.dumps(first.get_state()))
  assert state['next_sample'] == 4 * done
  again = loader(seed=3, crop_ratio=1.5)
  again.set_state(state)
  for wanted, found in zip(whole[done:], take(again, 10 - done), strict=True):
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
      np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_another_batch_size_is_told_and_goes_on(caplog):
  first = loader(seed=3)
  take(first, 3)
  other = loader(seed=3, batch=8)
  other.set_state(first.get_state())
  assert 'batch=4, now it is 8: the order of records differs' in caplog.text
  found = take(other, 3)
  fresh = take(loader(seed=3, batch=8), 5)[2:]  # from sample 16 on
  for a, b in zip(found, fresh, strict=True):
    np.testing.assert_array_equal(a['index'], b['index'])


def test_a_worker_gets_the_same_batches():
  wanted, plan = take(loader(seed=6), 4), loader(seed=6).plan
  sent = pickle.loads(pickle.dumps(plan))
  for k, batch in enumerate(wanted):
    np.testing.assert_array_equal(batch['target'], sent.load(0, k)[0]['target'])


def test_unreadable_records_are_square_and_then_bad():
  source = Ramps(12, bad=(1, 7))
  sizes = survey_sizes(source)
  assert sizes[[1, 7]].tolist() == [[0, 0], [0, 0]]
  it = loader(source, seed=1)
  for batch in take(it, 20):
    bad = np.isin(batch['index'], (1, 7))
    assert (batch['valid'] == ~bad).all()
    assert not bad.any() or batch['target'].shape[1:3] == (8, 8)
  assert sorted(it.bad.found) == [1, 7]


def test_an_empty_bucket_has_no_batches():
  made = make_buckets(np.array([[8, 8]] * 5), SIZES)
  assert made.counts == (5, 0, 0)
  assert made.used == ((8, 8),)
  assert made.describe() == '8x8: 5, 4x16: 0, 16x4: 0'
  assert {made.batch(k, 4, 0)[0] for k in range(9)} == {(8, 8)}


def test_sources_without_sizes_and_evaluation_are_refused():
  class Plain(Ramps):
    size = None

  with pytest.raises(ValueError, match=r'29 ramps, which does not .*jsonl'):
    survey_sizes(Plain())
  with pytest.raises(ValueError, match='does not tell the sizes'):
    survey_sizes(Controlled(Plain(), ('canny',)))
  assert (survey_sizes(Controlled(Ramps(), ('canny',)))[0] == (16, 16)).all()
  with pytest.raises(ValueError, match='accepted: pictures, in training'):
    loader(train=False)


def test_sizes_are_stored_for_their_data(tmp_path, caplog):
  path = epath.Path(tmp_path / 'sizes.npz')
  assert stored_sizes(path, Ramps()) is None
  store_sizes(path, Ramps(), survey_sizes(Ramps()))
  assert (stored_sizes(path, Ramps()) == survey_sizes(Ramps())).all()
  assert stored_sizes(path, Ramps(30)) is None
  assert 'is of other data than 30 ramps' in caplog.text


@pytest.mark.parametrize('turn', [None, 1, 3, 6, 8])
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'GIF'])
def test_the_header_tells_the_size_of_the_upright_picture(form, turn, tmp_path):
  path, more = tmp_path / 'picture', {}
  if turn and form != 'GIF':
    exif = Image.Exif()
    exif[274] = turn
    more = {'exif': exif.tobytes()}
  Image.new('RGB', (5, 9)).save(path, form, **more)
  for image in (path, path.read_bytes()):
    assert header_size(image) == decode(image).shape[:2]


def test_headers_that_cannot_be_read(tmp_path):
  for image, reason in (
    (tmp_path / 'none.png', 'none.png: has no readable header: .*No such file'),
    (b'', 'empty file'),
    (b'<html>', 'has no readable header'),
  ):
    with pytest.raises(RecordError, match=reason):
      header_size(image)
  content = io.BytesIO()
  Image.new('L', (7, 3)).save(content, 'PNG')
  assert header_size(content.getvalue()[:60]) == (3, 7)  # pixels are not read


def test_buckets_are_a_function_of_the_number():
  made = make_buckets(survey_sizes(Ramps()), SIZES)
  again = Buckets(made.sizes, made.members)
  for number in (0, 7, 10**9):
    (size, records), (other, same) = (
      b.batch(number, 4, 5) for b in (made, again)
    )
    assert size == other
    assert (records == same).all()
