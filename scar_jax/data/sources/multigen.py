"""MultiGen-20M: pictures with captions and control maps made beforehand.

In: `data.path`, the root with `images`, `conditions` and `json_files`, or one
of the JSON files (an object per line); `data.kind`, the control, such as
'canny'; `data.subset`, the first folder of the pictures that are used. Out: a
`Source` of kind 'control'. Folders may hold their zip files unpacked or not.

UniControl's lines name the picture `source` and the map `control_<kind>`;
those that SCAR reads, `image_path` and `control_<kind>_path`.
Source: salesforce/UniControl and AMAP-ML/SCAR, read for names and folders.
"""

import functools
import json
import os
import pathlib
from typing import Any

from scar_jax.config_values import nearest
from scar_jax.data.fields import Fields
from scar_jax.data.lines import Lines
from scar_jax.data.sources.jsonl import Jsonl, check_first, find_file
from scar_jax.data.stores import Store, open_store

KINDS = (
  *('canny', 'hed', 'hedsketch', 'lineart', 'depth', 'normal', 'seg'),
  *('openpose', 'bbox', 'outpainting', 'inpainting', 'blur', 'grayscale'),
)
_PICTURE = ('source', 'image_path')


def make(data_cfg: Any, split: str) -> Jsonl:
  """The source of a `data` section.

  Raises:
    ValueError: an unknown control, no JSON file, fields of another data set,
      or a subset without records.
  """
  kind = data_cfg.kind
  if kind not in KINDS:
    raise ValueError(
      f'data.kind={kind!r}; data.source=multigen accepts its controls:'
      f' {", ".join(KINDS)} (set --config.data.kind){nearest(kind, KINDS)}'
    )
  file = _find(data_cfg.path, kind, split)
  inside = file.parent.name == 'json_files'
  root = file.parent.parent if inside else file.parent
  fields = Fields(
    'control',
    data_cfg.columns,
    {
      'target': _PICTURE,
      'condition': (f'control_{kind}', f'control_{kind}_path'),
      'text': ('prompt',),
    },
  )
  subset = data_cfg.subset
  keep = functools.partial(_is_in, subset) if subset else None
  records = Lines(file, keep, f'subset {subset}')
  if subset and not len(records):
    raise ValueError(
      f'data.subset={subset!r}: no picture of {file} lies in it; its first is'
      f' {_picture_of(Lines(file).read(0))!r} (set --config.data.subset)'
    )
  check_first(records, fields)
  images = _store(data_cfg.images, root, 'images')
  stores = {
    'target': images,
    'mask': images,
    'condition': _store('', root, 'conditions'),
  }
  name = f'multigen {subset}'.strip()
  return Jsonl(file, fields, data_cfg.strict, stores, records, name)


def _find(path: str, kind: str, split: str) -> pathlib.Path:
  folder = pathlib.Path(path) / 'json_files'
  if path and folder.is_dir():
    # Maps of segmentation are called `segbase` in some releases.
    for name in (kind, f'{kind}base'):
      file = folder / f'aesthetics_plus_all_group_{name}_all.json'
      if file.is_file():
        return file
    found = sorted(p.name for p in folder.iterdir())
    raise ValueError(
      f'{folder} has no aesthetics_plus_all_group_{kind}_all.json; found:'
      f' {", ".join(found) or "nothing"}'
    )
  return find_file(path, split, 'multigen', ('.json', '.jsonl'))


def _store(given: str, root: pathlib.Path, name: str) -> Store:
  folder = root / name
  return open_store(given or (folder if folder.is_dir() else root))


def _picture_of(line: bytes) -> str:
  try:
    record = json.loads(line)
    value = next(record[n] for n in _PICTURE if n in record)
    return os.path.normpath(value)
  except (ValueError, TypeError, StopIteration):
    return ''


def _is_in(subset: str, line: bytes) -> bool:
  """Whether the picture of this line lies in the folder `subset`."""
  parts = _picture_of(line).split(os.sep)
  return subset in parts[:-1]
