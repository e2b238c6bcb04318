"""SEED-Data-Edit, Part 1 (Unsplash, OpenImages): pairs made by a pipeline.

In: `data.path`, the annotation file or the folder that holds `<split>.jsonl`
or `<split>.json` (one object per line, or one array); the pictures beside it,
or at `data.images`: a folder, unpacked or with its .tar and .zip files, or one
such file. Out: a `Source` of kind 'edit'.
Source: huggingface.co/datasets/AILab-CVC/SEED-Data-Edit-Part1-Unsplash, and
the reader of AMAP-ML/SCAR (method 8.3): captions are not used.
"""

from typing import Any

from scar_jax.data.fields import Fields
from scar_jax.data.lines import Lines
from scar_jax.data.sources.jsonl import Jsonl, check_first, find_file
from scar_jax.data.stores import open_store

_NAMES = {
  'target': ('target_image',),
  'condition': ('source_image',),
  'text': ('instruction',),
}


def make(data_cfg: Any, split: str) -> Jsonl:
  """The source of a `data` section.

  Raises:
    ValueError: no annotations, no pictures, or fields of another data set.
  """
  file = find_file(data_cfg.path, split, 'seed_edit')
  fields = Fields('edit', data_cfg.columns, _NAMES)
  records = Lines(file)
  check_first(records, fields)
  return Jsonl(
    file,
    fields,
    data_cfg.strict,
    open_store(data_cfg.images or file.parent),
    records,
    name='seed_edit',
  )
