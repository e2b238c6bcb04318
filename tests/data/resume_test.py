"""Killed and resumed at random: no record lost, none twice in an epoch."""

import json

import numpy as np
import pytest
import source_files as files

from scar_jax.data.pipeline import make_loader
from scar_jax.data.sources import make_source


@pytest.mark.parametrize('name', ['jsonl', 'webdataset', 'parquet', 'tfds'])
def test_kills_lose_and_repeat_nothing(name, tmp_path):
  count, batch, save_every = 24, 4, 2
  source = make_source(files.write(name, tmp_path, files.rows(count)))
  keys = [source.load(i, None).key for i in range(count)]
  rng = np.random.default_rng(3)
  state, committed, kills = None, [], 0
  while len(committed) < 2 * count:
    hosts = int(rng.choice((1, 2, 4)))
    loaders = [
      make_loader(
        source,
        None,
        batch,
        8,
        seed=1,
        process_index=p,
        process_count=hosts,
        threads=1 + int(rng.integers(3)),
      )
      for p in range(hosts)
    ]
    if state is not None:
      for loader in loaders:
        loader.set_state(json.loads(state))
    pending = []
    for _ in range(int(rng.integers(1, 6))):
      for loader in loaders:
        pending += [keys[i] for i in next(loader)['index']]
      if len(pending) == save_every * batch:
        committed += pending  # what a checkpoint holds
        pending = []
        state = json.dumps(loaders[0].get_state())
    kills += 1
    for loader in loaders:
      loader.close()
  assert kills > 3
  for epoch in range(2):
    assert sorted(committed[epoch * count :][:count]) == sorted(keys)
