"""Jobs of many requests: kills, bad requests, several processes."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from scar_jax.jobs.requests import read_requests
from scar_jax.jobs.work import Work, made_from, manifest


def _write(folder, count):
  """Requests with one bad one in twenty, in four ways."""
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / 'a.png')
  (folder / 'broken.png').write_bytes(b'\x89PNG\r\n')
  bad = [
    {'image': 'missing.png'},
    {'image': 'broken.png'},
    {'image': 'a.png', 'sed': 1},
    {'image': 'a.png', 'label': 99},
  ]
  rows = []
  for i in range(count):
    row = {'id': f'r{i:04d}', 'image': 'a.png', 'prompt': 'x', 'seed': i}
    if i % 20 == 7:
      row |= bad[i // 20 % 4]
    elif i % 3 == 0:
      row['label'] = 1  # of another shape
    rows.append(json.dumps(row))
  path = folder / 'requests.jsonl'
  path.write_text('\n'.join(rows) + '\n')
  return path


def test_killed_processes_make_every_request_once(tmp_path):
  count, out = 400, tmp_path / 'out'
  path = _write(tmp_path, count)
  done = subprocess.run(
    [
      sys.executable, pathlib.Path(__file__).with_name('forks.py'),
      path, out, '30',
    ],
    check=False, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout)
  assert told['status'] == [0, 0, 0]
  assert told['made_at_last'] == 0  # nothing was left for another process
  good, failed = read_requests(path)
  assert len(failed) == count // 80  # a field that is not known
  assert len(told['failed']) == count // 20
  assert 'missing file' in str(told['failed'])
  assert 'label 99; accepted: 0 to 9' in told['failed'].values()
  names = {p.name for p in out.iterdir()}
  made = list(manifest(good, out))
  assert len(made) == count - count // 20
  assert names == {row['file'] for row in made} | {'.claims'}
  for row in made:
    assert (
      np.asarray(Image.open(out / row['file']))[0, 0, 0] == row['seed'] % 256
    )
  # No two that lived made the same one: only what a kill has cut is made anew.
  log = (tmp_path / 'out.log').read_text().splitlines()
  drawn = [s for line in log for s in json.loads(line.split(' ', 1)[1])]
  assert len(drawn) - len(set(drawn)) <= 30 * 4
  assert len({line.split()[0] for line in log}) >= 3


class Stub:
  """Counts its calls; cannot do the seed 13."""

  cfg = types.SimpleNamespace(batch=3)

  def __init__(self):
    self.calls = []

  def __call__(self, pictures, prompts, *, seed, **_):
    self.calls.append(seed)
    if 13 in seed:
      raise ValueError('13 brings bad luck')
    return [np.zeros((4, 4, 3), np.uint8) for _ in seed]


def _job(tmp_path, rows, out='out'):
  path = tmp_path / 'r.jsonl'
  path.write_text('\n'.join(json.dumps(row) for row in rows))
  job = Work(Stub(), tmp_path / out, {'checkpoint': 'abc'}, {})
  return job, read_requests(path)[0]


def test_a_bad_request_takes_no_other_with_it(tmp_path):
  rows = [{'id': str(n), 'seed': n} for n in (11, 12, 13, 14)]
  job, good = _job(tmp_path, rows)
  counts, out = [], tmp_path / 'out'
  out.mkdir()
  for name in ('.12.png.part', '.other'):  # one of a process that was killed
    (out / name).write_bytes(b'half')
  job.run(good, counts.append)
  assert {p.name for p in out.glob('.*')} == {'.other', '.claims'}
  assert job.failed == {'r.jsonl line 3': '13 brings bad luck'}
  assert (job.made, sum(counts)) == (3, 4)
  assert job._editor.calls == [[11, 12, 13], [11], [12], [13], [14]]
  assert made_from(tmp_path / 'out/12.png') == {
    'id': '12', 'line': 2, 'seed': 12, 'prompt': '', 'checkpoint': 'abc',
  }  # fmt: skip
  again, good = _job(tmp_path, rows)
  again.run([r for r in good if not again.is_made(r)], counts.append)
  assert again._editor.calls == [[13]]


def test_a_picture_of_another_request_is_an_error(tmp_path):
  job, good = _job(tmp_path, [{'id': 'a', 'prompt': 'red'}])
  job.run(good, lambda count: None)
  other, [request] = _job(tmp_path, [{'id': 'a', 'prompt': 'blue'}])
  with pytest.raises(ValueError, match=r"prompt was 'red', is 'blue'; accept"):
    other.is_made(request)
  Image.new('RGB', (2, 2)).save(tmp_path / 'out/a.png')
  with pytest.raises(ValueError, match=r'a\.png was not made by scar sample'):
    other.is_made(request)
