"""Mixtures: shares, errors, and the same stream after any resume."""

import dataclasses

import numpy as np
import pytest
import source_files as files

from scar_jax import config as config_lib
from scar_jax.data.mixture import Mixture
from scar_jax.data.pipeline import make_loader
from scar_jax.data.sources import make_source


@pytest.fixture
def section(tmp_path):
  files.write('seed_edit', tmp_path, files.rows(5))
  files.write('parquet', tmp_path, files.rows(3))
  parts = (
    {'source': 'seed_edit', 'path': 'seed_edit', 'weight': 3},
    {'source': 'parquet', 'path': 'parquet', 'weight': 1.0},
  )
  raw = config_lib.default_config('scar')
  raw.data.update(dict(mixture=parts, path=str(tmp_path), batch=4))
  return config_lib.check(raw).data


def loader(section, **more):
  return make_loader(make_source(section), None, 8, 8, seed=1, **more)


def test_parts_from_a_config(section):
  assert [p.weight for p in section.mixture] == [3.0, 1.0]
  mixed = make_source(section)
  assert isinstance(mixed, Mixture)
  assert (len(mixed), mixed.counts, mixed.shares) == (8, (5, 3), (750, 250))
  assert 'mixture of 75.0 % seed_edit' in mixed.describe()
  keys = [mixed.load(i, None).key for i in range(8)]
  assert ['jsonl' in k for k in keys] == [True] * 5 + [False] * 3
  found = loader(section).plan.records_at(np.arange(1000))
  assert (found < 5).mean() == 0.75


def test_resume_and_hosts_read_the_same_stream(section):
  whole = loader(section)
  wanted = [next(whole)['index'] for _ in range(6)]
  first = loader(section)
  next(first)
  state = first.get_state()
  for hosts in (1, 2, 4):
    parts = [
      loader(section, process_index=p, process_count=hosts)
      for p in range(hosts)
    ]
    for part in parts:
      part.set_state(state)
    for k in range(1, 6):
      rows = np.concatenate([next(part)['index'] for part in parts])
      assert (rows == wanted[k]).all()


def test_evaluation_reads_each_record_once(section):
  rows = np.concatenate([b['index'] for b in loader(section, train=False)])
  assert rows.tolist() == list(range(8))


def test_changed_weights_are_reported(section, caplog):
  state = loader(section).get_state()
  first, second = section.mixture
  changed = dataclasses.replace(
    section, mixture=(first, dataclasses.replace(second, weight=3.0))
  )
  loader(changed).set_state(state)
  assert 'shares=[750, 250], now it is [500, 500]' in caplog.text


def test_parts_that_do_not_fit(section):
  first, second = section.mixture
  picture = (('target', 'edited_image'), ('condition', 'x'))
  other = dataclasses.replace(second, kind='image', columns=picture)
  for part, reason in (
    (dataclasses.replace(second, path='x'), r'mixture\[1\], parquet: .*x'),
    (dataclasses.replace(second, weight=0.0), r'accepted: .* > 0'),
    (other, r'has target; seed_edit .* has target, condition; accepted'),
  ):
    changed = dataclasses.replace(section, mixture=(first, part))
    with pytest.raises(ValueError, match=reason):
      make_source(changed)
