"""Index files: same rows in memory and on disk, made anew when data change."""

import json
import os
import pickle

import pytest

from scar_jax.data import index, lines
from scar_jax.data.index import Table


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'scar_jax' / 'index'


@pytest.fixture
def on_disk(cache, monkeypatch):
  monkeypatch.setattr(index, '_IN_MEMORY', 0)
  return cache


def table(file, values, notes=None, width=2):
  def blocks(found):
    found.update(notes or {})
    yield values[:width]
    yield values[width:]

  return Table('test', [file], width, blocks)


def test_rows_in_memory_touch_no_disk(tmp_path, cache):
  file = tmp_path / 'data'
  file.write_text('x')
  found = table(file, [1, 2, 3, 4, 5, 6], {'odd': 3})
  assert len(found) == 3
  assert found[1].tolist() == [3, 4]
  assert not list(cache.glob('*'))
  with pytest.raises(IndexError, match='row 3 of 3'):
    found[3]


def test_rows_on_disk_are_read_again(tmp_path, on_disk):
  file = tmp_path / 'data'
  file.write_text('x')
  values = [1, 2, 2**63, 4, 2**64 - 1, 6]
  first = table(file, values, {'odd': 3})
  assert len(list(on_disk.glob('*'))) == 1
  again = table(file, [9, 9])  # not made again
  for found in (first, again, pickle.loads(pickle.dumps(again))):
    assert [found[i].tolist() for i in range(3)] == [
      values[:2], values[2:4], values[4:],
    ]  # fmt: skip
    assert found.notes == {'odd': 3}
    assert [found.find(v) for v in (0, 2, 2**63, 2**64 - 1)] == [0, 1, 1, 2]
  os.utime(file, ns=(1, 1))
  assert table(file, [9, 9])[0].tolist() == [9, 9]


def test_a_failed_pass_leaves_nothing(tmp_path, on_disk):
  file = tmp_path / 'data'
  file.write_text('x')

  def blocks(notes):
    yield [1, 2]
    raise ValueError('broken')

  with pytest.raises(ValueError, match='broken'):
    Table('test', [file], 2, blocks)
  assert not list(on_disk.glob('*'))


def test_lines_on_disk_equal_lines_in_memory(tmp_path, cache, monkeypatch):
  path = tmp_path / 'a.jsonl'
  content = [b'{"a": %d}' % i if i % 7 else b'' for i in range(500)]
  path.write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join(content))
  monkeypatch.setattr(lines, '_BLOCK', 30)
  whole = lines.Lines(path)
  monkeypatch.setattr(index, '_IN_MEMORY', 100)
  stored = lines.Lines(path)
  assert len(list(cache.glob('*'))) == 1
  assert len(whole) == len(stored) == 428
  assert whole.blank == stored.blank == 72
  for i in range(428):
    assert whole.read(i) == stored.read(i)
    assert whole.number(i) == stored.number(i)
    assert json.loads(whole.read(i))['a'] == whole.number(i) - 1


def test_elements_of_one_array(tmp_path):
  path = tmp_path / 'a.json'
  rows = [{'text': 'é]"', 'n': [1, {}]}, {'text': '日本'}, 7]
  path.write_text(json.dumps(rows, indent=2, ensure_ascii=False))
  found = lines.Lines(path)
  assert [json.loads(found.read(i)) for i in range(len(found))] == rows
  assert (found.unit, found.number(2)) == ('element', 3)
  path.write_text('[{"a": 1}, {"b": ')
  with pytest.raises(ValueError, match='broken JSON array after 1 elements'):
    lines.Lines(path)


def test_kept_lines_have_an_index_of_their_own(tmp_path, on_disk):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
  odd = lines.Lines(path, lambda line: b'2' not in line, 'odd')
  assert [odd.number(i) for i in range(len(odd))] == [1, 3]
  assert len(lines.Lines(path)) == 3
