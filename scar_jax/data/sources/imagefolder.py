"""A folder of classes: one sub-folder of pictures for each.

In: `data.path/<split>/<class>/...` or `data.path/<class>/...`. Out: a `Source`
of pictures with labels: the label is the place of the class among the sorted
names of the folders. The key of a record is `<class>/<name>`, by which a
second tree holds its control map. Kinds: 'class', 'image', 'control'.
Source: the layout of ImageNet (method 8.1).
"""

import bisect
import os
import pathlib
from typing import Any

import numpy as np

from scar_jax.data import pictures
from scar_jax.data.records import Record

KINDS = ('class', 'image', 'control')
ENDINGS = frozenset(
  ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm')
)


def make(data_cfg: Any, split: str) -> 'ImageFolder':
  """The source of a `data` section."""
  check_class_kind('imagefolder', data_cfg.kind)
  root = pathlib.Path(data_cfg.path)
  if not data_cfg.path or not root.is_dir():
    raise ValueError(
      f'data.path={data_cfg.path!r} is no folder; data.source=imagefolder'
      ' needs one with a sub-folder for each class (set --config.data.path)'
    )
  return ImageFolder(root / split if (root / split).is_dir() else root)


def check_class_kind(source: str, kind: str) -> None:
  """Refuses kinds of records that hold no instruction.

  Raises:
    ValueError: names the kinds of sources of labelled pictures.
  """
  if kind not in KINDS:
    raise ValueError(
      f'data.kind={kind!r}; data.source={source} accepts {", ".join(KINDS)}:'
      ' it holds pictures and labels (set --config.data.kind)'
    )


class ImageFolder:
  """Pictures in folders of classes.

  Names are held as bytes: some 40 for each picture.

  Args:
    root: with a folder for each class.

  Attributes:
    classes: sorted names of the folders; a label is a place in it.
    others: files among the pictures that are none, and are left out.

  Raises:
    ValueError: no classes, or no picture in any; names what is there.
  """

  def __init__(self, root: pathlib.Path):
    self.root = root.absolute()
    self.classes = sorted(
      e.name
      for e in os.scandir(self.root)
      if e.is_dir() and not e.name.startswith('.')
    )
    self.others = 0
    names, firsts = [], []
    for label in self.classes:
      firsts.append(len(names))
      names += self._names(label)
    if not names:
      found = sorted(e.name for e in os.scandir(self.root))[:10]
      raise ValueError(
        f'{self.root}: no pictures in folders of classes; found:'
        f' {", ".join(found) or "nothing"}'
      )
    self._firsts = firsts
    blob = [os.fsencode(n) for n in names]
    self._blob = b''.join(blob)
    self._ends = np.cumsum([len(b) for b in blob])

  def _names(self, label: str) -> list[str]:
    """Paths below the folder of a class, sorted."""
    found = []
    folder = self.root / label
    for path, folders, files in os.walk(folder):
      folders.sort()
      for file in files:
        if os.path.splitext(file)[1].lower() in ENDINGS:
          found.append(os.path.relpath(os.path.join(path, file), folder))
        else:
          self.others += 1
    return sorted(found)

  def __len__(self) -> int:
    return len(self._ends)

  def describe(self) -> str:
    left = f', {self.others} other files left out' if self.others else ''
    return (
      f'imagefolder {self.root}: {len(self)} pictures of'
      f' {len(self.classes)} classes{left}'
    )

  def load(self, i: int, rng: np.random.Generator | None = None) -> Record:
    """Picture `i` in the order of classes and names."""
    del rng
    path, key, label = self._place(i)
    return Record(pictures.picture(path, key, key), label=label, key=key)

  def size(self, i: int) -> tuple[int, int]:
    """(height, width) of picture `i`, from its header."""
    path, key, _ = self._place(i)
    return pictures.size(path, key, key)

  def _place(self, i: int) -> tuple[pathlib.Path, str, int]:
    """Path, key and label of picture `i`."""
    # An empty class shares its start with the next: the last that starts here.
    label = bisect.bisect_right(self._firsts, i) - 1
    start = int(self._ends[i - 1]) if i else 0
    name = os.fsdecode(self._blob[start : int(self._ends[i])])
    key = f'{self.classes[label]}/{name}'
    return self.root / self.classes[label] / name, key, label
