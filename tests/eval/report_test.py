import io
import json

import numpy as np
import pytest
from rich.console import Console

from scar_jax.eval import report

RED = np.full((32, 32, 3), (200, 0, 0), np.uint8)


def test_grid_enlarges_without_smoothing():
  page = report.grid({'source': [RED, RED], 'text': ['dark skin', 'flip']})
  # 32 px -> a factor of round(112 / 32) = 4.
  assert (page == (200, 0, 0)).all(-1).sum() == 2 * 128 * 128
  assert len({tuple(c) for c in page.reshape(-1, 3)}) > 3  # letters


def test_blocks_stand_side_by_side():
  one = report.grid({'a': [RED] * 4})
  two = report.grid({'a': [RED] * 4}, blocks=2)
  assert two.shape[1] > 1.8 * one.shape[1]
  assert two.shape[0] < 0.6 * one.shape[0]
  assert (two == (200, 0, 0)).all(-1).sum() == 4 * 128 * 128


def test_uneven_columns_are_refused():
  with pytest.raises(ValueError, match=r"\{'a': 1, 'b': 2\}.*one length"):
    report.grid({'a': [RED], 'b': ['x', 'y']})


def test_write_grid(tmp_path):
  report.write_grid(tmp_path / 'new' / 'grid.png', {'a': [RED]}, 'title')
  assert (tmp_path / 'new' / 'grid.png').read_bytes()[:4] == b'\x89PNG'


def test_json_is_strict(tmp_path):
  path = tmp_path / 'm.json'
  value = {'b': np.float32(0.5), 'a': [float('nan'), np.arange(2)], 'n': 3}
  report.write_json(path, value)
  assert json.loads(path.read_text()) == {'a': [None, [0, 1]], 'b': 0.5, 'n': 3}


def test_failed_write_keeps_the_old_file(tmp_path):
  path = tmp_path / 'm.json'
  report.write_json(path, 1)

  def full(file):
    file.write(b'half')
    raise OSError(28, 'No space left on device')

  with pytest.raises(OSError, match='No space left'):
    report.write_atomic(path, full)
  assert path.read_text() == '1\n'
  assert [p.name for p in tmp_path.iterdir()] == ['m.json']


def test_table():
  out = io.StringIO()
  rows = {'new_edit': {'n': 200, 'tone_accuracy': 0.915}, 'other': {'n': 3e-6}}
  report.print_table(rows, 'scores', Console(file=out, width=80))
  assert 'tone accuracy' in out.getvalue()
  assert '0.915' in out.getvalue()
  assert '200' in out.getvalue()
  assert '3.0e-06' in out.getvalue()


def test_long_names_are_not_cut():
  out, name = io.StringIO(), 'a_work_of_a_long_name/that_says_what'
  row = {f'measure_{i}': 1.0 for i in range(6)}
  report.print_table({name: row}, '', Console(file=out, width=60))
  cells = [line.split('│')[1].strip() for line in out.getvalue().splitlines()
           if line.startswith('│')]  # fmt: skip
  assert ''.join(cells) == name
