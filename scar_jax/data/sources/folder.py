"""A user's folder, whichever way it is laid out.

In: `data.path`, a JSONL file, a folder with `<split>.jsonl`, or one with a
folder of pictures for each class. Out: the source `jsonl` or `imagefolder` of
it; either name may be given in place of this one.
"""

import pathlib
from typing import Any

from scar_jax.data.records import Source
from scar_jax.data.sources import imagefolder, jsonl


def make(data_cfg: Any, split: str) -> Source:
  """The source of a `data` section.

  Raises:
    ValueError: neither layout is found; says what the source needs.
  """
  path = pathlib.Path(data_cfg.path)
  lines = path.is_file() or any(path.glob('*.json*'))
  if data_cfg.path and not lines and any(p.is_dir() for p in path.glob('*')):
    return imagefolder.make(data_cfg, split)
  return jsonl.make(data_cfg, split)
