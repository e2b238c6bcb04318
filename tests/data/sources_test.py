"""Every source that reads files: whole, damaged and foreign data sets.

Cases C05, C06, C10, C14, C16, C17 and C18.
"""

import dataclasses
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import source_files as files
from PIL import Image

from scar_jax.data.pipeline import make_loader
from scar_jax.data.records import RecordError, Source
from scar_jax.data.sources import make_source
from scar_jax.data.sources.ip2p import bounds, make_seeds
from scar_jax.data.sources.pie import run_length_mask
from scar_jax.data.text import ByteText

every = pytest.mark.parametrize('name', files.SOURCES)
with_condition = pytest.mark.parametrize(
  'name', [n for n, (_, has) in files.SOURCES.items() if 'condition' in has]
)


def make(name, root, some=None, **changes):
  some = files.rows(side=files.side_of(name)) if some is None else some
  config = files.write(name, root, some)
  return make_source(dataclasses.replace(config, **changes))


def loaded(source):
  """Records by row, and reasons by key of those that cannot be used."""
  good, bad = {}, {}
  for i in range(len(source)):
    try:
      record = source.load(i, None)
      good[files.red(record)] = record
    except RecordError as error:
      bad[error.key] = error.reason
  return good, bad


@every
def test_all_records_of_a_whole_data_set(name, tmp_path):
  source = make(name, tmp_path)
  assert isinstance(source, Source)
  assert len(source) == 5
  good, bad = loaded(source)
  assert not bad
  assert sorted(good) == [0, 1, 2, 3, 4]
  has = files.SOURCES[name][1]
  for i, record in good.items():
    assert record.target.shape == (files.side_of(name),) * 2 + (3,)
    assert record.target.dtype == np.uint8
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
  good, bad = loaded(source)
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
  good, bad = loaded(make(name, tmp_path, some))
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
  good, bad = loaded(make(name, tmp_path, some))
  assert not bad
  assert good[1].condition[12, 12].tolist() == [255, 173, 0]


@every
def test_a_null_picture_is_a_bad_record(name, tmp_path):
  some = files.rows(side=files.side_of(name))
  some[1]['target'] = None
  good, bad = loaded(make(name, tmp_path, some))
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
  good, bad = loaded(make_source(config))
  assert sorted(good) == [0, 2, 3, 4]
  (reason,) = bad.values()
  assert ('outside' in reason) or ('address' in reason) or 'not the' in reason


def replace_in(path, old, new):
  path.write_text(path.read_text().replace(old, new))


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
  replace_in(tmp_path / name / file, old, new)
  with pytest.raises(ValueError, match='found') as error:
    make_source(config)
  before, after = str(error.value).split('found', 1)
  assert expected in before
  assert found in after


def test_webdataset_schema_and_columns(tmp_path):
  root = tmp_path / 'tars'
  root.mkdir()
  with tarfile.open(root / 'a.tar', 'w') as tar:
    for ending in ('before.png', 'after.png', 'txt'):
      files.add(tar, f'x/0.{ending}', files.picture('red'))
  section = files.DataConfig(
    source='webdataset', path=str(root), kind='control'
  )
  with pytest.raises(
    ValueError, match=r"no target; .*found: 'before', 'after'"
  ):
    make_source(section)
  columns = (('target', 'after'), ('condition', 'before'), ('text', 'none'))
  source = make_source(dataclasses.replace(section, columns=columns))
  assert source.load(0, None).key == 'a.tar/x/0'


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
  good, bad = loaded(source)
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
  good, bad = loaded(source)
  assert 'broken' in caplog.text
  assert len(good) + len(bad) == 20
  assert (len(good) > 0) == (name == 'seed_tar')
  assert all('of them broken' in reason for reason in bad.values())


def test_a_compressed_tar_says_what_to_do(tmp_path, caplog):
  config = files.write('seed_tar', tmp_path, files.rows(2))
  import gzip

  path = tmp_path / 'seed_tar' / 'images.tar'
  path.write_bytes(gzip.compress(path.read_bytes()))
  assert len(loaded(make_source(config))[1]) == 2
  assert 'compressed as a whole' in caplog.text


def test_c16_hugging_face_parquet(case, tmp_path):
  wanted = json.loads(case('manifest.json').read_text())['C16']['expect']
  from scar_jax.config import DataConfig

  def open_case(file, **more):
    return make_source(
      DataConfig(source='parquet', path=str(case(file)), **more)
    )

  source = open_case('c16_ip2p_hf.parquet')
  assert len(source) == wanted['ip2p_hf']['rows']
  good, bad = [], {}
  for i in range(len(source)):
    try:
      good.append((i, source.load(i, None)))
    except RecordError as error:
      bad[i] = (error.key, error.reason)
  assert [i for i, _ in good] == wanted['ip2p_hf']['good']
  near = good[0][1].condition[0, 0].astype(int)
  assert np.abs(near - wanted['ip2p_hf']['row0_original_rgb']).max() <= 3
  assert "missing file 'gone/0002_0.jpg'" in bad[2][1]
  assert 'is null' in bad[3][1]
  assert '0 bytes' in bad[4][1]
  assert bad[4][0] == 'c16_ip2p_hf.parquet row 4'
  raw = open_case('c16_raw_binary.parquet')
  assert [raw.load(i, None).text != '' for i in range(len(raw))] == [True] * 2
  with pytest.raises(ValueError, match=r'no target; accepted.*found: .*orig'):
    open_case('c16_no_edited_column.parquet')
  with pytest.raises(ValueError, match='0 rows in 1 shards'):
    open_case('c16_empty.parquet')
  with pytest.raises(ValueError, match=r'accepted names: no_such; found: '):
    open_case('c16_ip2p_hf.parquet', columns=(('target', 'no_such'),))
  with pytest.raises(ValueError, match=r"'n' for target is int64; accepted"):
    make_source(_numbers(tmp_path))
  # Unpacked once, the rows are the same.
  cached = open_case('c16_ip2p_hf.parquet', cache=str(tmp_path))
  assert (cached.load(1, None).target == source.load(1, None).target).all()
  assert len(list(tmp_path.glob('*.arrow'))) == 1


def _numbers(root):
  import pyarrow
  import pyarrow.parquet

  path = root / 'n.parquet'
  pyarrow.parquet.write_table(pyarrow.table({'n': [1, 2]}), path)
  return files.DataConfig(
    source='parquet', path=str(path), kind='image', columns=(('target', 'n'),)
  )


def test_magicbrush_columns_and_masks(tmp_path):
  some = files.rows(3)
  names = ('source_img', 'target_img')
  config = files.parquet(tmp_path / 'parquet', some, names)
  source = make_source(config)
  assert source.columns['condition'] == 'source_img'
  chosen = (('condition', 'target_img'), ('target', 'source_img'))
  swapped = make_source(dataclasses.replace(config, columns=chosen))
  assert swapped.load(2, None).target[0, 0].tolist() == [0, 20, 0]


@pytest.mark.parametrize(
  ('shares', 'wanted'),
  [
    ((0.9, 0.05, 0.05), [9, 1, 0]),
    ((0.7, 0.2, 0.1), [7, 2, 1]),
    ((0.6, 0.3, 0.1), [6, 3, 1]),
  ],
)
def test_c17_fractions_of_the_original_folders(case, shares, wanted):
  from scar_jax.config import DataConfig

  root = case('c17/seeds.json').parent
  names, bad = [], {}
  for split, count in zip(('train', 'val', 'test'), wanted, strict=True):
    section = DataConfig(
      source='ip2p', path=str(root), split=split, fractions=shares
    )
    if not count:
      with pytest.raises(ValueError, match=r'no names in data\.split'):
        make_source(section)
      continue
    source = make_source(section)
    assert len(source) == count
    names += [name for name, _ in source.seeds]
    bad |= loaded(source)[1]
  assert names == [f'{i:07d}' for i in range(10)]
  assert sorted(bad) == [f'{i:07d}/{100 + i}' for i in range(2, 10)]
  assert all('missing file' in reason for reason in bad.values())


def test_fractions_that_do_not_sum_to_one():
  assert [bounds(1000, (0.7, 0.2, 0.1), k)[0] for k in range(3)] == [
    0, 700, 900,
  ]  # fmt: skip
  for shares in ((0.7, 0.2, 0.2), (1.5, -0.5, 0.0)):
    with pytest.raises(ValueError, match=r'sum to .*accepted: shares >= 0'):
      bounds(10, shares, 0)


def test_seeds_are_listed_where_the_file_is_absent(case, tmp_path):
  root = tmp_path / 'c17'
  shutil.copytree(case('c17/seeds.json').parent, root)
  assert make_seeds(root) == [['0000000', ['100']], ['0000001', ['101']]]
  (root / 'seeds.json').write_text('[["../c17", ["100"]]]')
  with pytest.raises(ValueError, match=r"'\.\./c17' with seeds"):
    make_source(files.DataConfig(source='ip2p', path=str(root)))


def test_c18_masks_of_pie_bench(case):
  wanted = json.loads(case('manifest.json').read_text())['C18']['expect']
  items = json.loads(case('c18_mapping_file.json').read_text())
  for name, total in wanted['sum_plain'].items():
    mask = run_length_mask(items[name]['mask'], name, border=False)
    assert (mask != 0).sum() == total
    mask = run_length_mask(items[name]['mask'], name)
    assert (mask != 0).sum() == wanted['sum_with_official_border'][name]
  mask = run_length_mask(items['000000000000']['mask'], '')
  assert mask[100, 200] == 255
  assert mask[200, 100] == 0
  for name, reason in (
    ('000000000003', 'mask of 3 numbers'),
    ('000000000004', 'mask with -4'),
  ):
    with pytest.raises(RecordError, match=reason) as error:
      run_length_mask(items[name]['mask'], name)
    assert error.value.key == name


def test_c18_items(case, tmp_path):
  path = tmp_path / 'annotation_images' / '0_random_140'
  path.mkdir(parents=True)
  (path / '000000000000.png').write_bytes(files.picture('red', 512))
  shutil.copy(case('c18_mapping_file.json'), tmp_path / 'mapping_file.json')
  section = files.DataConfig(source='pie', path=str(tmp_path), kind='prompt')
  source = make_source(section)
  good, bad = {}, []
  for i in range(len(source)):
    try:
      record = source.load(i, None)
      good[record.key] = record
    except RecordError as error:
      bad.append(error.key)
  assert bad == ['000000000003', '000000000004']
  assert len(good) == 4
  record = good['000000000000']
  assert record.text == 'a slanted rusty bicycle on the road'
  assert record.meta['editing_instruction'] == 'Make the bicycle rusty'
  assert good['000000000005'].meta['labels'] == {'editing_type': 0}
  (path / '000000000000.png').write_bytes(files.picture('red', 500))
  with pytest.raises(RecordError, match='500x500 pixels; its mask is for 512'):
    source.load(0, None)


def test_multigen_subsets(tmp_path):
  config = files.write('multigen', tmp_path, files.rows(4))
  path = next((tmp_path / 'multigen/json_files').iterdir())
  lines = path.read_text().splitlines()
  lines[2] = lines[2].replace('aesthetics_6_plus_0', 'aesthetics_6_25_plus_3m')
  path.write_text('\n'.join(lines))
  chosen = dataclasses.replace(config, subset='aesthetics_6_plus_0')
  source = make_source(chosen)
  assert sorted(loaded(source)[0]) == [0, 1, 3]
  assert source.load(2, None).meta['line'] == 4
  with pytest.raises(ValueError, match=r"'six'.*first is 'aesthetics_6_plus_0"):
    make_source(dataclasses.replace(config, subset='six'))
  with pytest.raises(ValueError, match=r"'cany'.*Did you mean 'canny'"):
    make_source(dataclasses.replace(config, kind='cany'))


def test_tfds_splits_and_formats(tmp_path):
  config = files.write('tfds', tmp_path, files.rows(10))

  def of(split, **more):
    return make_source(dataclasses.replace(config, split=split, **more))

  whole = [files.red(of('train').load(i, None)) for i in range(10)]
  assert whole == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
  for split, low, high in (
    ('train[3:7]', 3, 7), ('train[:50%]', 0, 5), ('train[80%:]', 8, 10),
  ):  # fmt: skip
    source = of(split)
    found = [files.red(source.load(i, None)) for i in range(len(source))]
    assert found == whole[low:high]
  assert of('train[3:7]').load(3, None).key.endswith('00001-of-00002/1')
  for split in ('val', 'train[3', 'train[9:3]'):
    with pytest.raises(ValueError, match=r'data\.split='):
      of(split)
  with pytest.raises(ValueError, match=r'circles.*found: shapes'):
    of('train', source='tfds:circles')
  folder = tmp_path / 'tfds/shapes/1.0.0'
  assert len(of('train', path=str(folder))) == 10
  replace_in(folder / 'dataset_info.json', 'array_record"', 'tfrecord"')
  with pytest.raises(ValueError, match=r'tfrecord files.*convert_format'):
    of('train')


@pytest.mark.parametrize('name', ['jsonl', 'imagefolder'])
def test_a_folder_is_read_by_what_lies_in_it(name, tmp_path):
  config = files.write(name, tmp_path, files.rows())
  folder = dataclasses.replace(config, source='folder')
  want = make_source(config).describe()
  assert make_source(folder).describe() == want
  with pytest.raises(ValueError, match=r'data\.path is empty'):
    make_source(dataclasses.replace(folder, path=''))
