"""Case C14: messy JSONL, each line judged on its own."""

import dataclasses
import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from scar_jax.config import DataConfig
from scar_jax.data.fields import Fields
from scar_jax.data.pipeline import make_loader
from scar_jax.data.records import RecordError, Source
from scar_jax.data.sources import make_source
from scar_jax.data.sources.jsonl import Jsonl
from scar_jax.data.text import ByteText

EDIT = Fields('edit')


@pytest.fixture
def messy(case):
  return case('c14/edit_messy.jsonl')


@pytest.fixture
def wanted(case):
  return json.loads(case('manifest.json').read_text())['C14']['expect']


@pytest.fixture
def write(tmp_path):
  Image.new('RGB', (4, 4), 'red').save(tmp_path / 'a.png')

  def make(*lines, **more):
    rows = [
      x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines
    ]
    (tmp_path / 'train.jsonl').write_bytes(b'\n'.join(rows))
    fields = Fields(more.pop('kind', 'edit'))
    return Jsonl(tmp_path / 'train.jsonl', fields, **more)

  return make


GOOD = {'source': 'a.png', 'target': 'a.png', 'instruction': 'x'}


def test_c14_each_line_is_judged(messy, wanted):
  report = Jsonl(messy, EDIT).check(pictures=True)
  assert report.good == [int(n) for n in wanted['loadable']]
  assert report.blank == len(wanted['blank']) == 1
  assert {str(n) for n in report.bad} == set(wanted['bad'])
  for number, reason in wanted['bad'].items():
    assert reason in report.bad[int(number)]
  assert report.warnings == {
    3: 'duplicate key instruction: the last value counts',
    7: 'NaN in the unused field score',
  }
  assert report.duplicates == {9: 1}


def test_c14_strict_lists_all_bad_lines_at_once(messy):
  with pytest.raises(ValueError, match='lines 4, 5, 6, 8') as error:
    Jsonl(messy, EDIT, strict=True)
  for reason in (
    "line 4: missing file 'images/missing.png'",
    'line 5: broken JSON',
    'line 6: no instruction; accepted names: instruction',
    'line 8: not an object but list',
  ):
    assert reason in str(error.value)


def test_c14_lenient_uses_five_and_counts_four(messy, tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    loader = make_loader(
      Jsonl(messy, EDIT),
      ByteText(20),
      4,
      16,
      train=False,
      max_bad_share=0.5,
      workdir=tmp_path,
    )
    batches = list(loader)
  assert sum(int(b['valid'].sum()) for b in batches) == 5
  assert loader.bad.count == 4
  lines = (tmp_path / 'bad_records.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [int(r['key'].rsplit(':', 1)[1]) for r in rows] == [4, 5, 6, 8]
  assert 'missing file' in rows[0]['reason']
  assert 'epoch 1: 4 of 9 records skipped' in caplog.text


def test_c14_texts_and_pictures(messy):
  source = Jsonl(messy, EDIT)
  texts = {}
  for i in range(len(source)):
    try:
      record = source.load(i, None)
    except RecordError:
      continue
    texts[record.meta['line']] = record.text
    assert record.target.shape == record.condition.shape == (16, 16, 3)
  assert texts == {
    1: 'invert a',
    3: 'second',
    7: 'ok c',
    9: 'invert a',
    10: 'last, no newline',
  }


def test_c14_latin1_names_line_and_encoding(case):
  report = Jsonl(case('c14/latin1_line.jsonl'), EDIT).check()
  assert 'not UTF-8: byte 0xe9' in report.bad[1]
  assert 'latin-1' in report.bad[1]
  with pytest.raises(ValueError, match='line 1: not UTF-8'):
    Jsonl(case('c14/latin1_line.jsonl'), EDIT, strict=True)


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    ({'target': 3}, "not the path of a picture but int 3 .field 'target'"),
    ({'target': ''}, 'not the path'),
    ({'target': '../a.png'}, 'outside the data folder'),
    ({'target': '/etc/hostname'}, 'outside the data folder'),
    ({'target': 'https://x/a.png'}, 'an address, .*download it first'),
    ({'target': 'b\\a.png'}, 'use / between folders'),
    ({'target': 'a\0.png'}, 'missing file'),
    ({'target': '.'}, 'missing file'),
    ({'instruction': 42}, "field 'instruction': .*string, found int 42"),
    ({'instruction': float('nan')}, 'found float nan'),
    ({'instruction': ['x']}, 'found list'),
    ({'label': True}, "'label' is True; accepted: a whole number"),
    ({'label': -1}, "'label' is -1"),
  ],
)
def test_bad_fields_are_named(write, change, reason):
  source = write(GOOD | change)
  with pytest.raises(RecordError, match=reason) as error:
    source.load(0)
  assert error.value.key.endswith('train.jsonl:1')


def test_null_and_empty_instructions_are_the_null_prompt(write):
  source = write(GOOD | {'instruction': None}, GOOD | {'instruction': ' '})
  assert [source.load(i).text for i in range(2)] == ['', '']


@pytest.mark.parametrize(
  'names',
  [
    ('source_image', 'target_image', 'instruction'),
    ('original_image', 'edited_image', 'edit_prompt'),
    ('input', 'output', 'prompt'),
  ],
)
def test_names_of_other_data_sets(write, names):
  record = write(dict(zip(names, ('a.png', 'a.png', 'hi'), strict=True))).load(
    0
  )
  assert record.text == 'hi'
  assert record.condition[0, 0].tolist() == [255, 0, 0]


def test_kinds(write, tmp_path):
  depth = np.array([[0, 300], [600, 600]], np.uint16)
  Image.fromarray(depth).save(tmp_path / 'd.png')
  Image.new('L', (4, 4), 255).save(tmp_path / 'm.png')
  line = {'control': 'd.png', 'image': 'a.png', 'label': 7, 'mask': 'm.png'}
  record = write(line, kind='depth').load(0)
  assert record.condition[..., 0].tolist() == [[0, 128], [255, 255]]
  assert record.label == 7
  assert (record.mask == 255).all()
  with pytest.raises(RecordError, match=r'mask of 2x2 pixels .* 4x4'):
    write(line | {'mask': 'd.png'}, kind='depth').load(0)
  hole = np.full((4, 4, 4), 255, np.uint8)
  hole[1, 2, 3] = 0
  Image.fromarray(hole).save(tmp_path / 'm.png')
  mask = write(line, kind='depth').load(0).mask
  assert (mask.sum(), mask[1, 2]) == (255, 255)
  assert write(line, kind='image').load(0).target.shape == (4, 4, 3)
  with pytest.raises(RecordError, match='no instruction'):
    write(line).load(0)
  with pytest.raises(ValueError, match="'video'; accepted: edit, control"):
    write(line, kind='video')


@pytest.mark.parametrize('end', [b'', b'\n', b'\r\n', b'\n\n \n'])
@pytest.mark.parametrize('start', [b'', b'\xef\xbb\xbf', b'\xef\xbb\xbf\n\n'])
def test_line_ends_and_marks(write, start, end):
  one = json.dumps(GOOD).encode()
  source = write(start + one + b'\r\n\r\n' + one + end, strict=True)
  first = 1 + start.count(b'\n')
  assert [source.load(i).meta['line'] for i in range(2)] == [first, first + 2]
  assert len(pickle.loads(pickle.dumps(source))) == 2


def test_empty_and_utf16_files(write):
  for content in (b'', b'\n\r\n', b'\xef\xbb\xbf'):
    with pytest.raises(ValueError, match='no lines with content'):
      write(content)
  with pytest.raises(ValueError, match='UTF-16; save it as UTF-8'):
    write(json.dumps(GOOD).encode('utf-16'))


def test_registry(write, tmp_path):
  write(GOOD)
  section = DataConfig(source='jsonl', path=str(tmp_path))
  source = make_source(section)
  assert isinstance(source, Source)
  assert len(source) == 1
  assert 'jsonl' in source.describe()
  for changes, reason in (
    ({'source': 'jsnl'}, "data.source='jsnl'.*Did you mean 'jsonl'"),
    ({'path': ''}, 'data.path is empty'),
    ({'path': 'no/where'}, "'no/where' does not exist"),
    ({'split': 'val'}, 'no val.jsonl; found: train'),
    ({'columns': (('picture', 'a'),)}, "role 'picture'; accepted: target"),
  ):
    with pytest.raises(ValueError, match=reason):
      make_source(dataclasses.replace(section, **changes))
