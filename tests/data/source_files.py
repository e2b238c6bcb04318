"""Small data sets in the format of every source that reads files."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from scar_jax.config import DataConfig
from scar_jax.data.examples import write_example
from scar_jax.data.records import RecordError

SIDE = 8


def picture(colour: Any, side: int = SIDE, form: str = 'PNG') -> bytes:
  """A file of one colour."""
  stream = io.BytesIO()
  Image.new('RGB', (side, side), colour).save(stream, form)
  return stream.getvalue()


def rows(count: int = 5, side: int = SIDE) -> list[dict[str, Any]]:
  """Row i has red i in the target and green i in the condition."""
  return [
    {
      'target': picture((10 * i, 0, 0), side),
      'condition': picture((0, 10 * i, 0), side),
      'text': f'text {i}',
      'label': i % 2,
    }
    for i in range(count)
  ]


def _files(root, some, lines, name):
  """Pictures as files, and a line for each row."""
  (root / 'images').mkdir(parents=True)
  out = []
  for i, row in enumerate(some):
    for role in ('target', 'condition'):
      if row[role] is not None:
        (root / f'images/{i}_{role}.png').write_bytes(row[role])
    out.append(json.dumps(lines(i, row)))
  (root / name).write_text('\n'.join(out))


def _name(i, role, row, folder='images/'):
  return None if row[role] is None else f'{folder}{i}_{role}.png'


def jsonl(root, some):
  def line(i, row):
    return {
      'source': _name(i, 'condition', row),
      'target': _name(i, 'target', row),
      'instruction': row['text'],
      'label': row['label'],
    }

  _files(root, some, line, 'train.jsonl')
  return DataConfig(source='jsonl', path=str(root))


def _seed_line(i, row):
  return {
    'source_image': _name(i, 'condition', row),
    'target_image': _name(i, 'target', row),
    'instruction': row['text'],
    'source_caption': 'unused',
  }


def seed_edit(root, some):
  _files(root, some, _seed_line, 'train.jsonl')
  with zipfile.ZipFile(root / 'images.zip', 'w', zipfile.ZIP_DEFLATED) as file:
    for path in sorted((root / 'images').iterdir()):
      file.write(path, f'images/{path.name}')
      path.unlink()
  return DataConfig(source='seed_edit', path=str(root))


def seed_tar(root, some):
  config = seed_edit(root, some)
  with (
    zipfile.ZipFile(root / 'images.zip') as packed,
    tarfile.open(root / 'images.tar', 'w') as tar,
  ):
    for name in packed.namelist():
      add(tar, name, packed.read(name))
  (root / 'images.zip').unlink()
  return config


def multigen(root, some):
  json_files = root / 'json_files'
  json_files.mkdir(parents=True)
  lines = []
  for i, row in enumerate(some):
    names = {}
    for role, folder in (
      ('target', 'images/aesthetics_6_plus_0'),
      ('condition', 'conditions/aesthetics_6_25_plus_group_0_canny'),
    ):
      (root / folder).mkdir(parents=True, exist_ok=True)
      path = root / folder / f'{i}.png'
      names[role] = None if row[role] is None else '/'.join(path.parts[-2:])
      if row[role] is not None:
        path.write_bytes(row[role])
    lines.append(
      json.dumps(
        {
          'source': names['target'] and f'./{names["target"]}',
          'control_canny': names['condition'],
          'prompt': row['text'],
        }
      )
    )
  name = 'aesthetics_plus_all_group_canny_all.json'
  (json_files / name).write_text('\n'.join(lines))
  return DataConfig(source='multigen', kind='canny', path=str(root))


def imagefolder(root, some):
  for i, row in enumerate(some):
    folder = root / 'train' / f'class{row["label"]}'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{i}.png').write_bytes(row['target'] or b'')
  root.mkdir(exist_ok=True)
  return DataConfig(source='imagefolder', kind='class', path=str(root))


def tfds(root, some, shards=2):
  folder = root / 'shapes' / '1.0.0'
  folder.mkdir(parents=True)
  lengths = []
  for shard in range(shards):
    mine = some[shard::shards]
    lengths.append(str(len(mine)))
    name = f'shapes-train.array_record-{shard:05d}-of-{shards:05d}'
    writer = ArrayRecordWriter(str(folder / name), 'group_size:1')
    for row in mine:
      image = [] if row['target'] is None else [row['target']]
      writer.write(
        write_example(
          {'image': image, 'label': [row['label']], 'file_name': [b'x.png']}
        )
      )
    writer.close()
  info = {
    'name': 'shapes',
    'version': '1.0.0',
    'fileFormat': 'array_record',
    'splits': [
      {
        'name': 'train',
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        'shardLengths': lengths,
      }
    ],
  }
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  base = 'tensorflow_datasets.core.features'
  features = {
    'image': {
      'pythonClassName': f'{base}.image_feature.Image',
      'image': {
        'shape': {'dimensions': ['-1', '-1', '3']},
        'dtype': 'uint8',
        'encodingFormat': 'png',
      },
    },
    'label': {
      'pythonClassName': f'{base}.class_label_feature.ClassLabel',
      'classLabel': {'numClasses': '2'},
    },
    'file_name': {
      'pythonClassName': f'{base}.text_feature.Text',
      'text': {},
    },
  }
  tree = {
    'pythonClassName': f'{base}.features_dict.FeaturesDict',
    'featuresDict': {'features': features},
  }
  (folder / 'features.json').write_text(json.dumps(tree))
  return DataConfig(source='tfds:shapes', kind='class', path=str(root))


def parquet(root, some, names=('original_image', 'edited_image')):
  import pyarrow
  import pyarrow.parquet

  image = pyarrow.struct([('bytes', pyarrow.binary()), ('path', 'string')])
  before, after = names

  def cells(role):
    found = []
    for row in some:
      whole = {'bytes': row[role], 'path': None}
      found.append(None if row[role] is None else whole)
    return pyarrow.array(found, image)

  table = pyarrow.table(
    {
      before: cells('condition'),
      'edit_prompt': pyarrow.array([r['text'] for r in some], 'string'),
      after: cells('target'),
    }
  )
  (root / 'data').mkdir(parents=True)
  path = root / 'data' / 'train-00000-of-00001.parquet'
  pyarrow.parquet.write_table(table, path, row_group_size=2)
  return DataConfig(source='parquet', path=str(root))


def add(tar, name, content):
  info = tarfile.TarInfo(name)
  info.size = len(content)
  tar.addfile(info, io.BytesIO(content))


def webdataset(root, some, shards=2):
  root.mkdir(parents=True)
  for shard in range(shards):
    with tarfile.open(root / f'train-{shard:04d}.tar', 'w') as tar:
      for i, row in list(enumerate(some))[shard::shards]:
        if row['condition'] is not None:
          add(tar, f'{i:04d}.source.png', row['condition'])
        if row['target'] is not None:
          add(tar, f'{i:04d}.target.png', row['target'])
        add(tar, f'{i:04d}.json', json.dumps({'caption': row['text']}).encode())
        add(tar, f'{i:04d}.cls', str(row['label']).encode())
  return DataConfig(source='webdataset', path=str(root))


def ip2p(root, some):
  root.mkdir(parents=True)
  seeds = []
  for i, row in enumerate(some):
    folder = root / f'{i:07d}'
    folder.mkdir()
    (folder / 'prompt.json').write_text(
      json.dumps({'input': 'a', 'edit': row['text'], 'output': 'b'})
    )
    for k, role in enumerate(('condition', 'target')):
      if row[role] is not None:
        (folder / f'{7 + i}_{k}.jpg').write_bytes(row[role])
    seeds.append([folder.name, [str(7 + i)]])
  (root / 'seeds.json').write_text(json.dumps(seeds))
  return DataConfig(
    source='ip2p', path=str(root), fractions=(1.0, 0.0, 0.0), kind='edit'
  )


def pie(root, some):
  folder = root / 'annotation_images' / '0_random_140'
  folder.mkdir(parents=True)
  items = {}
  for i, row in enumerate(some):
    name = f'{i:012d}'
    if row['target'] is not None:
      (folder / f'{name}.png').write_bytes(row['target'])
    items[name] = {
      'image_path': None
      if row['target'] is None
      else f'{folder.name}/{name}.png',
      'original_prompt': 'a bicycle',
      'editing_prompt': f'a [rusty] bicycle {i}',
      'editing_instruction': row['text'],
      'editing_type_id': str(i % 10),
      'blended_word': '',
      'mask': [51400, 10],
    }
  (root / 'mapping_file.json').write_text(json.dumps(items))
  return DataConfig(source='pie', path=str(root))


# Name -> writer, and what its records have besides the target.
SOURCES: dict[str, tuple[Callable[..., DataConfig], set[str]]] = {
  'jsonl': (jsonl, {'condition', 'text', 'label'}),
  'imagefolder': (imagefolder, {'label'}),
  'tfds': (tfds, {'label'}),
  'parquet': (parquet, {'condition', 'text'}),
  'webdataset': (webdataset, {'condition', 'text', 'label'}),
  'ip2p': (ip2p, {'condition', 'text'}),
  'seed_edit': (seed_edit, {'condition', 'text'}),
  'seed_tar': (seed_tar, {'condition', 'text'}),
  'multigen': (multigen, {'condition', 'text'}),
  'pie': (pie, {'text'}),
}


def write(name: str, root: Any, some: list[dict[str, Any]]) -> DataConfig:
  """The data section of these rows, in the format of a source."""
  return SOURCES[name][0](root / name, some)


def side_of(name: str) -> int:
  """Pixels of a picture that the source accepts."""
  return 512 if name == 'pie' else SIDE


def red(record: Any) -> int:
  """Which row a record came from."""
  return round(int(np.median(record.target[..., 0])) / 10)


def loaded(source):
  """Records by row, and reasons by key of those that cannot be used."""
  good, bad = {}, {}
  for i in range(len(source)):
    try:
      record = source.load(i, None)
      good[red(record)] = record
    except RecordError as error:
      bad[error.key] = error.reason
  return good, bad


def replace_in(path, old, new):
  path.write_text(path.read_text().replace(old, new))
