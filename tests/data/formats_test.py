"""What one format alone has: splits, columns, masks. Cases C16, C17 and C18."""

import dataclasses
import json
import shutil
import tarfile

import numpy as np
import pytest
import source_files as files

from scar_jax.data.records import RecordError
from scar_jax.data.sources import make_source
from scar_jax.data.sources.ip2p import bounds, make_seeds
from scar_jax.data.sources.pie import run_length_mask


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


def test_c16_hugging_face_parquet(case, tmp_path):
  wanted = json.loads(case('manifest.json').read_text())['C16']['expect']

  def open_case(file, **more):
    return make_source(
      files.DataConfig(source='parquet', path=str(case(file)), **more)
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
  root = case('c17/seeds.json').parent
  names, bad = [], {}
  for split, count in zip(('train', 'val', 'test'), wanted, strict=True):
    section = files.DataConfig(
      source='ip2p', path=str(root), split=split, fractions=shares
    )
    if not count:
      with pytest.raises(ValueError, match=r'no names in data\.split'):
        make_source(section)
      continue
    source = make_source(section)
    assert len(source) == count
    names += [name for name, _ in source.seeds]
    bad |= files.loaded(source)[1]
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
  assert sorted(files.loaded(source)[0]) == [0, 1, 3]
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
  files.replace_in(folder / 'dataset_info.json', 'array_record"', 'tfrecord"')
  with pytest.raises(ValueError, match=r'tfrecord files.*convert_format'):
    of('train')
