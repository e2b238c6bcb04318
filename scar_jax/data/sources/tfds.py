"""TensorFlow Datasets of labelled pictures, from their ArrayRecord files.

In: `data.source=tfds:NAME` (as `imagenet2012`, `NAME/CONFIG`, `NAME:VERSION`),
`data.path`, the folder of data sets or of one version. Out: a `Source` of
pictures with labels: the only image and the only class label of the features.
A split may be cut as in TFDS: `train[:90%]`, `validation[1000:2000]`.

Neither TensorFlow nor tensorflow-datasets is needed: examples are parsed here
(`data/examples.py`) and shards are read by array_record, which holds 8 bytes
for each record. Nothing is downloaded.
Source: the files that `tfds build --file_format=array_record` writes.
"""

import json
import pathlib
import re
from typing import Any

import numpy as np

from scar_jax.data import pictures
from scar_jax.data.examples import parse_example
from scar_jax.data.fields import checked_label
from scar_jax.data.records import Record, RecordError
from scar_jax.data.shards import Part, open_records
from scar_jax.data.sources.imagefolder import check_class_kind

_INFO, _FEATURES = 'dataset_info.json', 'features.json'
_SPLIT = re.compile(r'(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?')
_TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'


def make(data_cfg: Any, split: str) -> 'Tfds':
  """The source of a `data` section."""
  check_class_kind('tfds', data_cfg.kind)
  name = data_cfg.source.partition(':')[2]
  return Tfds(find_version(data_cfg.path, name), split)


def find_version(path: str, name: str) -> pathlib.Path:
  """The folder of one version of a data set; the newest if none is named.

  Raises:
    ValueError: no such data set; lists what is there.
  """
  root = pathlib.Path(path)
  if not path or not root.is_dir():
    raise ValueError(
      f'data.path={path!r} is no folder; data.source=tfds:{name} needs the'
      ' folder of TensorFlow data sets (set --config.data.path)'
    )
  if (root / _INFO).is_file():
    return root
  name, _, version = name.partition(':')
  folder = root / name
  found = sorted(
    (p.parent for p in folder.glob(f'{version or "*"}/{_INFO}')),
    key=lambda p: [int(n) for n in re.findall(r'\d+', p.name)],
  )
  if not name or '..' in name or not found:
    base = folder if folder.is_dir() else root
    there = sorted(p.name for p in base.iterdir() if p.is_dir())
    raise ValueError(
      f'data.source=tfds:{name}{":" * bool(version)}{version}: no {_INFO} in a'
      f' version of it below {folder}; found: {", ".join(there) or "nothing"}'
    )
  return found[-1]


class Tfds:
  """Records of one split.

  Args:
    folder: of one version, with `dataset_info.json` and `features.json`.
    split: name, and what part of it.

  Raises:
    ValueError: not ArrayRecord, no such split, or features other than one
      image and one class label; shows what was found.
  """

  def __init__(self, folder: pathlib.Path, split: str):
    self.folder = folder
    self.split = split
    info = _read(folder / _INFO)
    self.image, self.label = _features(_read(folder / _FEATURES), folder)
    self.parts = _parts(folder, info, split)
    self._reader: Any = None
    self._ends = np.cumsum([p.take for p in self.parts])
    self._open()

  def _open(self) -> None:
    self._reader = open_records(self.parts)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def describe(self) -> str:
    return (
      f'tfds {self.folder}: {len(self)} examples of {self.split} in'
      f' {len(self.parts)} shards'
    )

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Example `i` of the split; nothing is random here."""
    del rng
    key, image, label = self._values(i)
    return Record(
      pictures.picture(image, self.image, key),
      label=checked_label(label, self.label, key),
      key=key,
    )

  def size(self, i: int) -> tuple[int, int]:
    """(height, width) of the picture of example `i`, from its header."""
    key, image, _ = self._values(i)
    return pictures.size(image, self.image, key)

  def _values(self, i: int) -> tuple[str, bytes, Any]:
    """Key, content of the picture and label of example `i`."""
    key, example = self.example(i)
    try:
      image, label = example[self.image][0], example[self.label][0]
    except (KeyError, IndexError) as error:
      raise RecordError(key, f'no value of feature {error}') from error
    if not isinstance(image, bytes):
      raise RecordError(key, f'{self.image!r} is {type(image).__name__}')
    return key, image, label

  def example(self, i: int) -> tuple[str, dict[str, Any]]:
    """Key and features of example `i`.

    Raises:
      RecordError: the shard is broken, or holds no examples.
    """
    shard = int(np.searchsorted(self._ends, i, side='right'))
    part = self.parts[shard]
    inside = i - int(self._ends[shard]) + part.take + part.skip
    key = f'{pathlib.Path(part.filename).name}/{inside}'
    try:
      return key, parse_example(self._reader[i])
    except Exception as error:
      # array_record raises RuntimeError and ValueError with its own texts.
      raise RecordError(key, f'cannot be read: {error}') from error

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_reader': None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise ValueError(f'{path}: cannot be read: {error}') from error


def _features(tree: dict[str, Any], folder: pathlib.Path) -> tuple[str, str]:
  """Names of the image and of the label."""
  features = tree.get('featuresDict', {}).get('features', {})
  kinds = {
    name: feature.get('pythonClassName', '').rpartition('.')[2]
    for name, feature in features.items()
  }
  images = [n for n, kind in kinds.items() if kind == 'Image']
  labels = [n for n, kind in kinds.items() if kind == 'ClassLabel']
  if len(images) != 1 or len(labels) != 1:
    listed = ', '.join(f'{n} {kind}' for n, kind in kinds.items())
    raise ValueError(
      f'{folder / _FEATURES}: expected one Image and one ClassLabel; found:'
      f' {listed or "no features"}'
    )
  return images[0], labels[0]


def _parts(
  folder: pathlib.Path, info: dict[str, Any], split: str
) -> list[Part]:
  """The shards of a split, cut to what is asked for."""
  known = {s['name']: s for s in info.get('splits', [])}
  match = _SPLIT.fullmatch(split)
  if not match or match[1] not in known:
    raise ValueError(
      f'data.split={split!r} of {folder}; accepted: {", ".join(known)}, or a'
      ' part such as train[:90%] (set --config.data.split)'
    )
  kind = info.get('fileFormat', 'tfrecord')
  if kind != 'array_record':
    raise ValueError(
      f'{folder} holds {kind} files, which have no random access; convert them'
      ' once: python -m tensorflow_datasets.scripts.convert_format'
      ' --dataset_version_dir=DIR --out_file_format=array_record'
    )
  found = known[match[1]]
  lengths = [int(n) for n in found['shardLengths']]
  template = found.get('filepathTemplate') or _TEMPLATE
  total = sum(lengths)
  first, last = _bound(match[2], total, 0), _bound(match[3], total, total)
  parts, start = [], 0
  for number, length in enumerate(lengths):
    shard = f'{number:05d}-of-{len(lengths):05d}'
    name = template
    for word, value in {
      'DATASET': info['name'],
      'SPLIT': match[1],
      'FILEFORMAT': kind,
      'SHARD_X_OF_Y': shard,
    }.items():
      name = name.replace(f'{{{word}}}', value)
    low, high = max(first - start, 0), min(last - start, length)
    if low < high:
      path = str(folder / pathlib.PurePath(name).name)
      parts.append(Part(path, low, high - low, length))
    start += length
  if not parts:
    raise ValueError(f'data.split={split!r} of {folder}: 0 of {total} examples')
  return parts


def _bound(text: str | None, total: int, default: int) -> int:
  """A place in a split; percentages as TFDS rounds them."""
  if text is None:
    return default
  if text.endswith('%'):
    return min(total, round(int(text[:-1]) * total / 100))
  return min(total, int(text))
