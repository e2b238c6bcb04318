"""Every source that reads files: whole, damaged and foreign data sets.

Cases C05, C06 and C10; C14 is in `jsonl_test.py`.
"""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
import source_files as files
from PIL import Image

from scar_jax.data.pipeline import make_loader
from scar_jax.data.records import RecordError, Source
from scar_jax.data.sources import make_source
from scar_jax.data.text import ByteText

every = pytest.mark.parametrize('name', files.SOURCES)
with_condition = pytest.mark.parametrize(
  'name', [n for n, (_, has) in files.SOURCES.items() if 'condition' in has]
)


def make(name, root, some=None, **changes):
  some = files.rows(side=files.side_of(name)) if some is None else some
  config = files.write(name, root, some)
  return make_source(dataclasses.replace(config, **changes))


@every
def test_all_records_of_a_whole_data_set(name, tmp_path):
  source = make(name, tmp_path)
  assert isinstance(source, Source)
  assert len(source) == 5
  good, bad = files.loaded(source)
  assert not bad
  assert sorted(good) == [0, 1, 2, 3, 4]
  has = files.SOURCES[name][1]
  for i, record in good.items():
    assert record.target.shape == (files.side_of(name),) * 2 + (3,)
    assert record.target.dtype == np.uint8
    if name != 'pie':  # only scored
      assert source.size(i) == record.target.shape[:2]
    if 'condition' in has:
      assert (record.condition == (0, 10 * i, 0)).all()
    assert record.text == (f'text {i}' if 'text' in has else '')
    assert record.label == (i % 2 if 'label' in has else None)
  assert len({r.key for r in good.values()}) == 5
  assert str(tmp_path) in source.describe()
  again = pickle.loads(pickle.dumps(source))
  assert again.load(3, None).key == source.load(3, None).key


@every
@pytest.mark.parametrize('case_name', ['truncated', 'zero_bytes', 'html'])
def test_c06_a_damaged_picture_is_named_and_the_rest_is_used(
  name, case_name, case, tmp_path
):
  file = {'html': 'html_not_image'}.get(case_name, case_name)
  some = files.rows(side=files.side_of(name))
  some[2]['target'] = case(f'c06_{file}.jpg').read_bytes()
  source = make(name, tmp_path, some)
  good, bad = files.loaded(source)
  assert sorted(good) == [0, 1, 3, 4]
  ((key, reason),) = bad.items()
  assert key
  wanted = {
    'truncated': 'cannot be decoded',
    'zero_bytes': 'empty file',
    'html': 'not an image',
  }
  assert wanted[case_name] in reason
  loader = make_loader(
    source, ByteText(20), 5, 8, train=False, max_bad_share=0.5
  )
  (batch,) = loader
  assert batch['valid'].sum() == 4
  assert [b.key for b in loader.bad.found.values()] == [key]
  strict = make_loader(source, ByteText(20), 5, 8, train=False, strict=True)
  with pytest.raises(RecordError, match=wanted[case_name]):
    next(strict)


@with_condition
def test_c10_flat_and_1_bit_conditions(name, case, tmp_path):
  some = files.rows(3)
  maps = ('c10_depth_zero_L', 'c10_depth_const_L', 'c10_edges_1bit')
  for row, file in zip(some, maps, strict=True):
    row['condition'] = case(f'{file}.png').read_bytes()
    with Image.open(case(f'{file}.png')) as image:
      row['target'] = files.picture((10 * maps.index(file), 0, 0), image.width)
  good, bad = files.loaded(make(name, tmp_path, some))
  assert not bad
  for i, row in good.items():
    assert row.condition.shape[2] == 3
    assert row.condition.dtype == np.uint8
    values = np.unique(row.condition)
    assert (len(values) == 1) == (i < 2)
  assert not good[0].condition.any()
  assert np.unique(good[2].condition).tolist() == [0, 255]


@with_condition
def test_c05_a_palette_map_gives_its_colours(name, case, tmp_path):
  some = files.rows(2)
  some[1]['condition'] = case('c05_seg_palette.png').read_bytes()
  good, bad = files.loaded(make(name, tmp_path, some))
  assert not bad
  assert good[1].condition[12, 12].tolist() == [255, 173, 0]


@every
def test_a_null_picture_is_a_bad_record(name, tmp_path):
  some = files.rows(side=files.side_of(name))
  some[1]['target'] = None
  good, bad = files.loaded(make(name, tmp_path, some))
  assert sorted(good) == [0, 2, 3, 4]
  assert len(bad) == 1


@every
def test_an_empty_data_set_is_an_error(name, tmp_path):
  with pytest.raises(ValueError, match=r'(?i)no |0 of|0 rows|0 names') as error:
    make(name, tmp_path, [])
  assert str(tmp_path) in str(error.value) or 'data.path' in str(error.value)


@every
def test_no_path_names_the_field(name, tmp_path):
  with pytest.raises(ValueError, match=r'data\.path'):
    make(name, tmp_path, path='')
  with pytest.raises(ValueError, match=r"no/where'.*(no folder|not exist|no )"):
    make(name, tmp_path / 'again', path='no/where')


@every
def test_unlisted_files_change_nothing(name, tmp_path):
  wanted = make(name, tmp_path)
  root = tmp_path / name
  for folder in (root, *(p for p in sorted(root.rglob('*')) if p.is_dir())):
    (folder / '.DS_Store').write_bytes(b'x')
    (folder / 'notes.txt').write_text('x')
  config = files.SOURCES[name][0](tmp_path / 'other', files.rows(1, 512))
  again = make_source(dataclasses.replace(config, path=str(root)))
  assert len(again) == len(wanted)
  assert again.load(4, None).key == wanted.load(4, None).key


@pytest.mark.parametrize(
  'name', ['jsonl', 'seed_edit', 'seed_tar', 'multigen', 'pie']
)
@pytest.mark.parametrize(
  'value', ['../../secret.png', '/etc/passwd', 'https://host/a.png', 7, ['a']]
)
def test_no_name_leaves_the_data_folder(name, value, tmp_path):
  some = files.rows(side=files.side_of(name))
  config = files.write(name, tmp_path, some)
  (tmp_path / 'secret.png').write_bytes(files.picture('red'))
  root = tmp_path / name
  for path in (*root.glob('*.json*'), *root.glob('json_files/*')):
    text = path.read_text()
    for old in ('images/1_target.png', './aesthetics_6_plus_0/1.png'):
      text = text.replace(f'"{old}"', json.dumps(value))
    old = '0_random_140/000000000001.png'
    path.write_text(text.replace(f'"{old}"', json.dumps(value)))
  good, bad = files.loaded(make_source(config))
  assert sorted(good) == [0, 2, 3, 4]
  (reason,) = bad.values()
  assert ('outside' in reason) or ('address' in reason) or 'not the' in reason


@pytest.mark.parametrize(
  ('name', 'file', 'old', 'new', 'expected', 'found'),
  [
    ('seed_edit', 'train.jsonl', 'target_image', 'after', 'target_image',
     "'after'"),
    ('multigen', 'json_files/aesthetics_plus_all_group_canny_all.json',
     'control_canny', 'control_hed', 'control_canny', "'control_hed'"),
    ('pie', 'mapping_file.json', '"mask"', '"runs"', 'mask', 'runs'),
    ('tfds', 'shapes/1.0.0/features.json', 'ClassLabel', 'BBox',
     'one ClassLabel', 'label BBox'),
  ],
)  # fmt: skip
def test_another_schema_shows_expected_and_found(
  name, file, old, new, expected, found, tmp_path
):
  config = files.write(name, tmp_path, files.rows(2, files.side_of(name)))
  files.replace_in(tmp_path / name / file, old, new)
  with pytest.raises(ValueError, match='found') as error:
    make_source(config)
  before, after = str(error.value).split('found', 1)
  assert expected in before
  assert found in after


@pytest.mark.parametrize('name', ['parquet', 'webdataset', 'tfds'])
def test_damaged_shards_are_counted(name, tmp_path):
  config = files.write(name, tmp_path, files.rows(20))
  shards = sorted(
    p
    for p in (tmp_path / name).rglob('*')
    if p.suffix in ('.tar', '.parquet') or 'array_record' in p.name
  )
  if name == 'parquet':
    shutil.copy(shards[0], shards[0].with_name('train-00001-of-00002.parquet'))
  size = shards[0].stat().st_size
  with open(shards[0], 'r+b') as file:
    file.truncate(size // 2)
  source = make_source(config)
  good, bad = files.loaded(source)
  assert 10 <= len(good) <= 20
  assert bad
  assert all(shards[0].name in key for key in bad)
  assert len(good) + len(bad) <= len(source) <= 40
  loader = make_loader(source, None, 8, 8, train=False, max_bad_share=1.0)
  rows = sum(int(b['valid'].sum()) for b in loader)
  assert rows == len(source) - loader.bad.count


@pytest.mark.parametrize('name', ['seed_edit', 'seed_tar'])
def test_a_damaged_archive_names_its_members(name, tmp_path, caplog):
  config = files.write(name, tmp_path, files.rows(20))
  (archive,) = (tmp_path / name).glob('images.*')
  content = archive.read_bytes()
  archive.write_bytes(content[: len(content) // 2])
  source = make_source(config)
  good, bad = files.loaded(source)
  assert 'broken' in caplog.text
  assert len(good) + len(bad) == 20
  assert (len(good) > 0) == (name == 'seed_tar')
  assert all('of them broken' in reason for reason in bad.values())


def test_a_compressed_tar_says_what_to_do(tmp_path, caplog):
  config = files.write('seed_tar', tmp_path, files.rows(2))
  import gzip

  path = tmp_path / 'seed_tar' / 'images.tar'
  path.write_bytes(gzip.compress(path.read_bytes()))
  assert len(files.loaded(make_source(config))[1]) == 2
  assert 'compressed as a whole' in caplog.text


@pytest.mark.parametrize('name', ['jsonl', 'imagefolder'])
def test_a_folder_is_read_by_what_lies_in_it(name, tmp_path):
  config = files.write(name, tmp_path, files.rows())
  folder = dataclasses.replace(config, source='folder')
  want = make_source(config).describe()
  assert make_source(folder).describe() == want
  with pytest.raises(ValueError, match=r'data\.path is empty'):
    make_source(dataclasses.replace(folder, path=''))
