"""Batches: exact resume, any number of hosts, evaluation, bad records."""

import json

import numpy as np
import pytest

from scar_jax.data.pipeline import make_loader
from scar_jax.data.records import Record, RecordError
from scar_jax.data.text import ByteText


class Numbers:
  """Record i is a grey picture of i; `bad` ones cannot be used."""

  def __init__(self, count=50, bad=(), size=(8, 8), broken=()):
    self.count, self.bad, self.size, self.broken = count, bad, size, broken

  def __len__(self):
    return self.count

  def describe(self):
    return f'{self.count} numbers'

  def load(self, i, rng):
    if i in self.bad:
      raise RecordError(f'row {i}', 'no picture')
    if i in self.broken:
      raise KeyError('bug')
    picture = np.full((*self.size, 3), i % 256, np.uint8)
    noise = 0 if rng is None else int(rng.integers(1000))
    return Record(
      picture,
      picture,
      f'number {i}',
      label=i,
      key=f'row {i}',
      meta={'labels': {'noise': noise}, 'other': 'ignored'},
    )


def loader(source=None, batch=8, size=8, **more):
  more = {'max_bad_share': 1.0} | more
  source = Numbers() if source is None else source
  return make_loader(source, ByteText(16), batch, size, **more)


def take(it, n):
  return [next(it) for _ in range(n)]


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(parts):
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def test_columns_types_and_ranges():
  batch = next(loader())
  kinds = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
  assert kinds == {
    'target': ((8, 8, 8, 3), 'float32'),
    'condition': ((8, 8, 8, 3), 'float32'),
    'text': ((8, 16), 'int32'),
    'text_mask': ((8, 16), 'bool'),
    'label': ((8,), 'int32'),
    'label_noise': ((8,), 'int32'),
    'valid': ((8,), 'bool'),
    'index': ((8,), 'int32'),
  }
  grey = np.rint((batch['target'][:, 0, 0, 0] + 1) * 127.5)
  assert (grey == batch['index']).all()
  assert (batch['label'] == batch['index']).all()
  assert batch['valid'].all()


def test_an_epoch_has_each_record_once():
  batches = take(loader(Numbers(48)), 6)
  assert sorted(joined(batches)['index']) == list(range(48))


def test_resume_is_exact_in_the_middle_of_an_epoch():
  whole = take(loader(seed=3), 12)
  first = loader(seed=3)
  take(first, 5)
  state = json.loads(json.dumps(first.get_state()))
  assert state['next_sample'] == 40
  second = loader(seed=3)
  second.set_state(state)
  for a, b in zip(whole[5:], take(second, 7), strict=True):
    same(a, b)
  # Back again, in the same object.
  first.set_state(state)
  same(next(first), whole[5])


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_share_one_stream(hosts):
  source = Numbers(50, bad=(7, 30))
  whole = take(loader(source, seed=1), 8)
  parts = [
    take(
      loader(source, seed=1, process_index=p, process_count=hosts, threads=p), 8
    )
    for p in range(hosts)
  ]
  for k, wanted in enumerate(whole):
    found = joined([part[k] for part in parts])
    same(
      {n: found[n] for n in ('index', 'valid')},
      {n: wanted[n] for n in ('index', 'valid')},
    )
    for name, value in wanted.items():
      np.testing.assert_array_equal(
        found[name][wanted['valid']], value[wanted['valid']], err_msg=name
      )


def test_a_host_loads_the_rows_that_its_devices_hold():
  source = Numbers(50)
  whole = take(loader(source, seed=1), 3)
  # Two hosts that a tensor axis spans, and rows that lie apart.
  for rows in ((0, 1, 2, 3), (0, 1, 6, 7)):
    found = take(loader(source, seed=1, rows=rows), 3)
    for a, b in zip(found, whole, strict=True):
      same(a, {name: value[list(rows)] for name, value in b.items()})
  with pytest.raises(ValueError, match=r'rows 0 to 8 .*data.batch=8'):
    loader(source, rows=(0, 8))


def test_c28_the_next_sample_is_160_whatever_the_layout(case):
  before = loader(seed=2)
  take(before, 20)
  state = before.get_state()
  assert state['next_sample'] == 160
  wanted = take(before, 2)
  for hosts in (1, 2, 4):
    its = [
      loader(seed=2, process_index=p, process_count=hosts) for p in range(hosts)
    ]
    for it in its:
      it.set_state(state)
    for k in range(2):
      same(joined([next(it) for it in its]), wanted[k])
  half = loader(seed=2, batch=4)
  half.set_state(state)
  for k in range(2):
    same(joined(take(half, 2)), wanted[k])


def test_state_of_other_data_is_reported(caplog):
  it = loader(Numbers(40))
  it.set_state(loader().get_state() | {'next_sample': 16})
  assert 'records=50, now it is 40' in caplog.text
  assert it.next_sample == 16
  with pytest.raises(ValueError, match='no next_sample'):
    it.set_state({'next': 3})


def test_c26_evaluation_of_10_on_batches_of_4_gives_exactly_10():
  it = loader(Numbers(10), batch=4, train=False)
  assert len(it) == 3
  batches = list(it)
  assert [b['valid'].tolist() for b in batches] == [
    [True] * 4,
    [True] * 4,
    [True, True, False, False],
  ]
  assert batches[-1]['index'].tolist() == [8, 9, -1, -1]
  all_rows = joined(batches)
  assert all_rows['index'][all_rows['valid']].tolist() == list(range(10))
  assert list(it) == []
  # With two hosts the second has one valid row less, never a missing batch.
  hosts = [
    list(loader(Numbers(10), 4, train=False, process_index=p, process_count=2))
    for p in range(2)
  ]
  assert [len(h) for h in hosts] == [3, 3]
  assert sum(int(b['valid'].sum()) for h in hosts for b in h) == 10


def test_evaluation_is_deterministic_and_training_is_not_repeated():
  assert not joined(list(loader(train=False)))['label_noise'].any()
  train = joined(take(loader(Numbers(4), 4), 8))
  noise = train['label_noise'].reshape(8, 4)
  assert len(np.unique(noise)) > 20
  again = joined(take(loader(Numbers(4), 4), 8))['label_noise']
  assert (again == train['label_noise']).all()
  still = take(loader(Numbers(4), 4, augment=False), 3)
  assert not joined(still)['label_noise'].any()


def test_bad_records_keep_their_place_without_loss(tmp_path):
  source = Numbers(50, bad=(3, 20))
  it = loader(source, seed=4, workdir=tmp_path)
  good = take(loader(seed=4), 25)
  for wanted, found in zip(good, take(it, 25), strict=True):
    assert (found['index'] == wanted['index']).all()
    assert (found['valid'] == ~np.isin(found['index'], (3, 20))).all()
    valid = found['valid']
    assert (found['target'][valid] == wanted['target'][valid]).all()
    # Not a blank picture: a copy of a real row.
    first = found['target'][np.argmax(valid)]
    assert (found['target'][~valid] == first).all()
  assert (it.bad.rows, it.bad.count, len(it.bad.found)) == (200, 8, 2)
  path = tmp_path / 'bad_records.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert sorted(r['key'] for r in rows) == ['row 20', 'row 3']
  assert {r['reason'] for r in rows} == {'no picture'}
  # The next run of the same work directory adds nothing twice.
  again = loader(source, seed=5, workdir=tmp_path)
  take(again, 25)
  assert len(path.read_text().splitlines()) == 2
  # Another host has a file of its own.
  other = loader(source, workdir=tmp_path, process_index=1, process_count=2)
  take(other, 13)
  assert (tmp_path / 'bad_records.1.jsonl').exists()
  state = it.get_state()
  again.set_state(state)
  assert again.get_state()['rows_bad'] == 8


def test_strict_stops_at_the_first():
  it = loader(Numbers(50, bad=(3,)), train=False, strict=True)
  with pytest.raises(RecordError, match='row 3: no picture'):
    next(it)


def test_too_large_a_share_stops_with_the_list():
  source = Numbers(1000, bad=range(1, 1000, 10))
  it = loader(source, max_bad_share=0.05, train=False)
  with pytest.raises(ValueError, match=r'6 of 56 .*max_bad_share=0\.05') as e:
    list(it)
  for i in (1, 11, 51):
    assert f'row {i}: no picture' in str(e.value)
  assert len(list(loader(source, max_bad_share=0.11, train=False))) == 125
  # A few among many do not stop the first batch.
  few = Numbers(1000, bad=(0, 1))
  assert len(list(loader(few, max_bad_share=0.02, train=False))) == 125


def test_nothing_usable_is_an_error_before_training():
  with pytest.raises(ValueError, match='0 numbers: 0 records'):
    loader(Numbers(0))
  with pytest.raises(ValueError, match=r'none of the first 5 .*\n.*row 0: no'):
    loader(Numbers(5, bad=range(5)))


def test_a_bug_in_a_source_names_the_record():
  it = loader(Numbers(50, broken=(5,)), train=False)
  with pytest.raises(RuntimeError, match=r'record 5 of 50 numbers.*bug'):
    next(it)


@pytest.mark.parametrize(
  ('more', 'reason'),
  [
    ({'batch': 10, 'process_count': 4}, r'batch=10 .* 4 hosts.* 8 and 12'),
    ({'batch': 0}, 'batch=0'),
    ({'process_index': 2, 'process_count': 2}, 'process 2 of 2'),
    ({'fit': 'squeeze'}, "'squeeze'; accepted: crop, letterbox, stretch"),
  ],
)
def test_settings_that_cannot_be(more, reason):
  with pytest.raises(ValueError, match=reason):
    loader(**more)


@pytest.mark.parametrize('fit', ['crop', 'letterbox', 'stretch'])
def test_any_size_of_picture(fit):
  batch = next(loader(Numbers(size=(13, 9)), size=(8, 4), fit=fit))
  assert batch['target'].shape == (8, 8, 4, 3)
  grey = np.rint((batch['condition'][:, 4, 2, 0] + 1) * 127.5)
  assert (grey == batch['index']).all()


def test_crops_are_paired_and_drawn_in_training_only():
  class Noise(Numbers):
    def load(self, i, rng):
      picture = np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)
      return Record(picture, picture, 'x')

  one = next(loader(Noise(1), 4, crop_ratio=2.0))
  assert (one['target'] == one['condition']).all()
  assert (one['target'][0] != one['target'][1]).any()
  fixed = next(loader(Noise(1), 1, crop_ratio=2.0, train=False))
  again = next(loader(Noise(1), 1, crop_ratio=2.0, train=False, seed=9))
  assert (fixed['target'] == again['target']).all()


def test_mirroring_is_paired_and_in_training_only():
  class Ramps(Numbers):
    def load(self, i, rng):
      picture = np.zeros((8, 8, 3), np.uint8)
      picture[:, 4:] = 255
      return Record(picture, picture, 'x')

  left = next(loader(Ramps(), 32, flip=0.5))['target'][:, 0, 0, 0] > 0
  assert 8 < left.sum() < 24
  batch = next(loader(Ramps(), 32, flip=0.5))
  assert (batch['target'] == batch['condition']).all()
  fixed = next(loader(Ramps(), 32, flip=1.0, train=False))['target']
  assert (fixed[:, 0, 0] == -1).all()


def test_stretching_keeps_the_values_of_a_map():
  class Wide(Numbers):
    def load(self, i, rng):
      picture = np.zeros((4, 16, 3), np.uint8)
      picture[:, ::2] = 255
      return Record(picture, picture, 'x')

  batch = next(loader(Wide(), fit='stretch'))
  assert set(np.unique(batch['condition'])) <= {-1.0, 1.0}
  assert not set(np.unique(batch['target'])) <= {-1.0, 1.0}


def test_records_that_do_not_fit_the_columns():
  class Mixed(Numbers):
    def load(self, i, rng):
      record = super().load(i, rng)
      if i == 1:
        record.condition = None
      if i == 2:
        record.label = None
      if i == 3:
        record.target = record.target[..., 0]
      if i == 4:
        record.text = 42
      return record

  it = loader(Mixed(6), 6, train=False)
  assert next(it)['valid'].tolist() == [True, False, False, False, False, True]
  reasons = [b.reason for b in it.bad.found.values()]
  for found, wanted in zip(
    reasons, ('no condition', 'no label', 'uint8 (8, 8)', 'int 42'), strict=True
  ):
    assert wanted in found


def test_worker_processes_give_the_same_batches():
  source = Numbers(50, bad=(3,))
  wanted = take(loader(source, seed=6), 5)
  it = loader(source, seed=6, workers=2)
  for a in wanted[:3]:
    same(next(it), a)
  state = it.get_state()
  it.close()
  more = loader(source, seed=6, workers=1)
  more.set_state(state)
  for a in wanted[3:]:
    same(next(more), a)
  more.close()
