"""PIE-Bench: 700 pictures with an instruction and a mask, to score edits on.

In: `data.path`, the mapping file or the folder that holds
`mapping_file.json` and `annotation_images`. Out: a `Source` without a true
result: the target is the source picture, so that what lies outside of the
mask can be compared. `data.kind` says which text conditions: 'edit' the
instruction, 'prompt' the description of the result; both are in `meta`.
Source: cure-lab/PnPInversion (method 10.4), read for the format.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from scar_jax.data import pictures
from scar_jax.data.records import Record, RecordError
from scar_jax.data.stores import Missing, open_store
from scar_jax.data.text import checked_text

KINDS = ('edit', 'prompt')
SIDE = 512  # pixels of the square that the masks are written for
_FIELDS = (
  *('image_path', 'original_prompt', 'editing_prompt', 'editing_instruction'),
  *('editing_type_id', 'mask'),
)


def make(data_cfg: Any, split: str) -> 'PieBench':
  """The source of a `data` section; there is one split."""
  del split
  if data_cfg.kind not in KINDS:
    raise ValueError(
      f'data.kind={data_cfg.kind!r}; data.source=pie accepts'
      f' {", ".join(KINDS)} (set --config.data.kind)'
    )
  return PieBench(data_cfg.path, data_cfg.kind, data_cfg.images)


def run_length_mask(
  runs: Sequence[int], key: str, border: bool = True
) -> UInt8[np.ndarray, '512 512']:
  """255 where the edit may change pixels.

  Args:
    runs: start, length, start, length, ... in the rows of 512 x 512 pixels.
    key: of the item, for messages.
    border: also the outermost pixels, as the official scorer does.

  Raises:
    RecordError: no such list; a run past the end is cut.
  """
  whole = isinstance(runs, list) and all(type(r) is int for r in runs)
  if not whole or len(runs) % 2 or min(runs, default=0) < 0:
    reason = 'not a list of whole numbers'
    if whole:
      odd = len(runs) % 2
      reason = f'of {len(runs)} numbers' if odd else f'with {min(runs)}'
    raise RecordError(
      key, f'mask {reason}; accepted: pairs of start and length, all >= 0'
    )
  flat = np.zeros(SIDE * SIDE, np.uint8)
  for start, length in zip(runs[::2], runs[1::2], strict=True):
    flat[start : start + length] = 255
  mask = flat.reshape(SIDE, SIDE)
  if border:
    mask[[0, -1]] = 255
    mask[:, [0, -1]] = 255
  return mask


def without_brackets(prompt: str) -> str:
  """The prompt as encoders read it: the marked words stay, the marks go."""
  return prompt.replace('[', '').replace(']', '')


class PieBench:
  """Items of a mapping file, sorted by their id.

  Args:
    path: the mapping file, or its folder.
    kind: which text is the record's, see `KINDS`.
    images: folder of the pictures; '' is `annotation_images` beside the file.

  Raises:
    ValueError: no such file, no items, or other fields than expected.
  """

  def __init__(self, path: str, kind: str = 'edit', images: str = ''):
    self.kind = kind
    self.path = pathlib.Path(path)
    if path and self.path.is_dir():
      self.path /= 'mapping_file.json'
    if not path or not self.path.is_file():
      raise ValueError(
        f'data.path={path!r} has no mapping_file.json; data.source=pie needs'
        ' it (set --config.data.path)'
      )
    try:
      items = json.loads(self.path.read_bytes())
    except ValueError as error:
      raise ValueError(f'{self.path}: broken JSON: {error}') from error
    if not isinstance(items, dict) or not items:
      raise ValueError(f'{self.path}: no items; wanted an object of ids')
    self.items = sorted(items.items())
    name, first = self.items[0]
    found = list(first) if isinstance(first, dict) else [type(first).__name__]
    if not set(_FIELDS) <= set(found):
      raise ValueError(
        f'{self.path}, item {name}: expected fields {", ".join(_FIELDS)};'
        f' found: {", ".join(found) or "nothing"}'
      )
    folder = self.path.parent / 'annotation_images'
    beside = folder if folder.is_dir() else self.path.parent
    self.store = open_store(images or beside)

  def __len__(self) -> int:
    return len(self.items)

  def describe(self) -> str:
    return f'pie {self.path}: {len(self)} items, text of kind {self.kind}'

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Item `i`; nothing is random here."""
    del rng
    key, item = self.items[i]
    try:
      texts = {
        n: without_brackets(checked_text(item[n], key)) for n in _FIELDS[1:4]
      }
      kind = int(item['editing_type_id'])
      runs, name = item['mask'], item['image_path']
      place = self.store.find(name)
    except (KeyError, TypeError) as error:
      raise RecordError(key, f'field {error} is missing') from error
    except Missing as error:
      raise RecordError(key, f'{error} (field image_path)') from error
    except RecordError:
      raise
    except ValueError as error:
      raise RecordError(key, f'editing_type_id: {error}') from error
    mask = run_length_mask(runs, key)
    source = pictures.picture(self.store.read(place), name, key)
    if source.shape[:2] != mask.shape:
      h, w = source.shape[:2]
      raise RecordError(
        key, f'{name} has {w}x{h} pixels; its mask is for {SIDE}x{SIDE}'
      )
    text = 'editing_instruction' if self.kind == 'edit' else 'editing_prompt'
    return Record(
      target=source,
      condition=source,
      text=texts[text],
      mask=mask,
      key=key,
      meta={
        **texts,
        'blended_word': item.get('blended_word', ''),
        'labels': {'editing_type': kind},
      },
    )
