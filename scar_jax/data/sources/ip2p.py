"""InstructPix2Pix as its authors published it: folders, prompts, seeds.json.

In: `data.path` with `<name>/prompt.json` and `<name>/<seed>_0.jpg` (before),
`_1.jpg` (after); `seeds.json` lists names and seeds, and where it is absent
the folders are listed in its place (`make_seeds`). `data.fractions` cut the
names into train, val and test. Out: a `Source` of kind 'edit'; in training
one of the seeds of a name is drawn, else the first is taken.
Source: timothybrooks/instruct-pix2pix, read for the layout.
"""

import fractions
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from scar_jax.data import pictures
from scar_jax.data.records import Record, RecordError
from scar_jax.data.text import checked_text

SPLITS = ('train', 'val', 'test')
_SEEDS = 'seeds.json'


def make(data_cfg: Any, split: str) -> 'InstructPix2Pix':
  """The source of a `data` section."""
  if data_cfg.kind != 'edit':
    raise ValueError(
      f'data.kind={data_cfg.kind!r}; data.source=ip2p accepts edit'
    )
  return InstructPix2Pix(data_cfg.path, split, data_cfg.fractions)


def bounds(count: int, shares: Sequence[float], part: int) -> tuple[int, int]:
  """First and last + 1 of the names in a part.

  Shares are the decimal numbers that were written, so that 0.7, 0.2, 0.1 make
  one; each name is in exactly one part.

  Args:
    count: names in all.
    shares: of each part; they sum to 1.
    part: which.

  Raises:
    ValueError: negative, or another sum.
  """
  exact = [fractions.Fraction(str(s)) for s in shares]
  if min(exact, default=-1) < 0 or sum(exact) != 1:
    raise ValueError(
      f'data.fractions={tuple(shares)} sum to {float(sum(exact))}; accepted:'
      ' shares >= 0 that sum to 1 (set --config.data.fractions)'
    )
  ends = [round(count * sum(exact[:k])) for k in range(len(exact) + 1)]
  return ends[part], ends[part + 1]


def make_seeds(root: pathlib.Path) -> list[list[Any]]:
  """What `seeds.json` would hold: name and seeds of each folder with both."""
  seeds = []
  for folder in sorted(p.parent for p in root.glob('*/prompt.json')):
    found = sorted(p.name[: -len('_0.jpg')] for p in folder.glob('*_0.jpg'))
    whole = [s for s in found if (folder / f'{s}_1.jpg').is_file()]
    if whole:
      seeds.append([folder.name, whole])
  return seeds


class InstructPix2Pix:
  """Records of one part of the names.

  Args:
    path: the folder.
    split: one of `SPLITS`.
    shares: of train, val and test.

  Raises:
    ValueError: no names, an unknown split, or shares that do not sum to 1.
  """

  def __init__(self, path: str, split: str, shares: Sequence[float]):
    self.root = pathlib.Path(path).absolute()
    if not path or not self.root.is_dir():
      raise ValueError(
        f'data.path={path!r} is no folder; data.source=ip2p needs the one with'
        f' {_SEEDS} (set --config.data.path)'
      )
    if split not in SPLITS or len(shares) != len(SPLITS):
      raise ValueError(
        f'data.split={split!r} of data.fractions={tuple(shares)}; accepted:'
        f' {", ".join(SPLITS)}, one share for each'
      )
    self.split = split
    self.seeds = _read_seeds(self.root)
    first, last = bounds(len(self.seeds), shares, SPLITS.index(split))
    self.seeds = self.seeds[first:last]
    if not self.seeds:
      raise ValueError(
        f'{self.root}: no names in data.split={split!r}; no folder has a'
        ' prompt.json with its pictures, or its share is too small'
      )

  def __len__(self) -> int:
    return len(self.seeds)

  def describe(self) -> str:
    return f'ip2p {self.root}: {len(self)} names of {self.split}'

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Name `i`, with the seed that `rng` draws, or the first."""
    name, seeds = self.seeds[i]
    seed = seeds[0 if rng is None else int(rng.integers(len(seeds)))]
    folder = self.root / name
    key = f'{name}/{seed}'
    try:
      prompt = json.loads((folder / 'prompt.json').read_bytes())
      text = prompt['edit']
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise RecordError(
        key, f"prompt.json: {error!r}; wanted an object with 'edit'"
      ) from error
    before, after = (
      pictures.picture(folder / f'{seed}_{k}.jpg', f'{seed}_{k}.jpg', key)
      for k in (0, 1)
    )
    return Record(after, before, checked_text(text, key), key=key)

  def size(self, i: int) -> tuple[int, int]:
    """(height, width) of the target of name `i`, of its first seed."""
    name, seeds = self.seeds[i]
    file = f'{seeds[0]}_1.jpg'
    return pictures.size(self.root / name / file, file, f'{name}/{seeds[0]}')


def _read_seeds(root: pathlib.Path) -> list[list[Any]]:
  path = root / _SEEDS
  if not path.is_file():
    return make_seeds(root)
  try:
    seeds = json.loads(path.read_bytes())
    for name, some in seeds:
      inside = pathlib.PurePath(name)
      parts = (*inside.parts, *(str(s) for s in some))
      if not some or '..' in parts or len(inside.parts) != 1:
        raise ValueError(f'{name!r} with seeds {some!r}')
      if any('/' in str(s) for s in some):
        raise ValueError(f'seeds {some!r} of {name!r}')
  except (ValueError, TypeError) as error:
    raise ValueError(
      f'{path}: {error}; wanted [[name, [seed, ...]], ...]'
    ) from error
  return seeds
