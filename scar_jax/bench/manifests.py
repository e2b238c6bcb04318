"""Time and memory to open large data sets: JSONL and ArrayRecord.

In: numbers of records. Out: for each format and number the seconds to open it
for the first and for the second time, the memory that opening and reading at
random adds to a fresh process, and the time of one read. Called by `scar bench
manifests`.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from scar_jax.bench.timing import Report
from scar_jax.config_values import read_value
from scar_jax.data.examples import write_example
from scar_jax.extras import require

FORMATS = ('jsonl', 'array_record')
_READS = 10_000  # records read at random
_SHARD = 1250  # records


def run(given: Any) -> Report:
  """Measures; `given` are the flags of `scar bench`."""
  counts = read_value('--counts', tuple[int, ...], given.counts)
  rows = []
  for count in counts:
    for form in FORMATS:
      with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        path = write(root, form, count)
        # An index of its own for each run, opened twice.
        env = os.environ | {'XDG_CACHE_HOME': str(root / 'cache')}
        first, second = (_fresh(form, path, env) for _ in range(2))
        rows.append(
          {
            'format': form,
            'records': count,
            'first_open_seconds': first['open_seconds'],
            'open_seconds': second['open_seconds'],
            'rss_mib': second['rss_mib'],
            'added_mib': second['added_mib'],
            'first_added_mib': first['added_mib'],
            'read_us': second['read_us'],
          }
        )
  settings = {'cores': os.cpu_count(), 'reads': _READS}
  return Report(
    settings, rows, lambda row: f'{row["format"]}, {row["records"]}'
  )


def write(root: pathlib.Path, form: str, count: int) -> pathlib.Path:
  """A data set of `count` records that all name one small picture."""
  if form == 'jsonl':
    path = root / 'train.jsonl'
    with open(path, 'w') as file:
      for i in range(count):
        file.write(
          json.dumps({'image': f'images/{i:09d}.jpg', 'caption': f'no. {i}'})
          + '\n'
        )
    return path
  module = require('array_record.python.array_record_module', 'data')
  folder = root / 'numbers' / '1.0.0'
  folder.mkdir(parents=True)
  # Shards of as many records as TFDS makes of ImageNet.
  lengths = [min(_SHARD, count - start) for start in range(0, count, _SHARD)]
  for number, length in enumerate(lengths):
    of = f'{number:05d}-of-{len(lengths):05d}'
    path = folder / f'numbers-train.array_record-{of}'
    writer = module.ArrayRecordWriter(str(path), 'group_size:1')
    for i in range(length):
      writer.write(write_example({'image': [b'picture'], 'label': [i]}))
    writer.close()
  split = {'name': 'train', 'shardLengths': [str(n) for n in lengths]}
  info = {'name': 'numbers', 'fileFormat': 'array_record', 'splits': [split]}
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  features = {
    name: {'pythonClassName': f'tensorflow_datasets.core.features.{kind}'}
    for name, kind in (('image', 'Image'), ('label', 'ClassLabel'))
  }
  tree = {'featuresDict': {'features': features}}
  (folder / 'features.json').write_text(json.dumps(tree))
  return root


def _fresh(form: str, path: pathlib.Path, env: Any) -> dict[str, float]:
  """`measure` in a process of its own."""
  code = (
    'import json, sys; from scar_jax.bench import manifests;'
    f' print(json.dumps(manifests.measure({form!r}, {str(path)!r})))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=env,
    check=True,
    capture_output=True,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def measure(form: str, path: str) -> dict[str, float]:
  """Opens a data set and reads at random; memory as the system counts it."""
  from scar_jax.config import DataConfig
  from scar_jax.data.sources import make_source

  jsonl = form == 'jsonl'
  section = DataConfig(
    source='jsonl' if jsonl else 'tfds:numbers',
    path=path,
    kind='image' if jsonl else 'class',
  )
  # Imports are no part of it: a data set of one line loads them.
  with tempfile.TemporaryDirectory() as folder:
    one = write(pathlib.Path(folder), form, 1)
    _read(make_source(dataclasses.replace(section, path=str(one))), 0)
  before = _rss()
  start = time.perf_counter()
  source = make_source(section)
  opened = time.perf_counter() - start
  places = np.random.default_rng(0).integers(0, len(source), _READS).tolist()
  start = time.perf_counter()
  for place in places:
    _read(source, place)
  seconds = time.perf_counter() - start
  return {
    'open_seconds': opened,
    'read_us': 1e6 * seconds / _READS,
    'rss_mib': _rss(),
    'added_mib': _rss() - before,
  }


def _read(source: Any, i: int) -> None:
  """The bytes of a record, without its picture."""
  if hasattr(source, 'lines'):
    source.lines.read(i)
  else:
    source.example(i)


def _rss() -> float:
  """Resident memory of this process, MiB."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmRSS'):
      return int(line.split()[1]) / 1024
  raise ValueError('resident memory is read from /proc, which Linux has')
