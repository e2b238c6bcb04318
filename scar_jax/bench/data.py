"""Images per second of the input pipeline, beside a PyTorch DataLoader.

In: number of workers, side, batch. Out: a row for our loader and one for a
`torch.utils.data.DataLoader` with Pillow, over the same JPEG files and the same
work: decode, resize, crop, edges by OpenCV, text to ids, floats in [-1, 1].
Start-up and the batches that are loaded ahead are left out. Called by `scar
bench data`.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

from scar_jax.bench.timing import Report
from scar_jax.data import manifest
from scar_jax.data.controls import canny
from scar_jax.data.fields import Fields
from scar_jax.data.geometry import crop
from scar_jax.data.pipeline import make_loader
from scar_jax.data.records import Record
from scar_jax.data.shards import Columns, ShardWriter, pack, read_dtype
from scar_jax.data.sources.cache import Cache
from scar_jax.data.sources.jsonl import Jsonl
from scar_jax.data.text import ByteText
from scar_jax.extras import require

_AHEAD = 8  # batches before the clock starts
_EPOCHS = 1000  # of PyTorch's files as one, so that no epoch ends while timed
_TEXT = 120  # tokens, as in the recipes at 512 pixels
_TORCH = 'torch'
_CACHED = 128  # rows of a cache
_PICTURE = (640, 480)  # width, height of a source file


class Edges:
  """A source of pictures with their edges as the condition, at one size."""

  def __init__(self, source: Jsonl, side: int):
    self.source = source
    self.side = side

  def __len__(self) -> int:
    return len(self.source)

  def describe(self) -> str:
    return f'{self.source.describe()}, edges'

  def load(self, i: int, rng: np.random.Generator | None) -> Record:
    """Record `i`, cropped to the side, with its edges."""
    record = self.source.load(i, rng)
    (target,) = crop([record.target], self.side)
    assert target is not None
    record.target, record.condition = target, canny(target)
    return record


def run(given: Any) -> Report:
  """Measures; `given` are the flags of `scar bench`.

  Raises:
    ValueError: PyTorch is not installed; names the extra.
  """
  torch = require('torch', 'bench')
  batch, workers = max(8, given.batch), given.workers
  with tempfile.TemporaryDirectory() as folder:
    file = write_pictures(pathlib.Path(folder), given.records)
    source = Edges(Jsonl(file, Fields('image')), given.side)
    loaders: dict[str, Any] = {}
    for threads in (1, 2):
      loaders[f'scar_jax, threads {threads}'] = make_loader(
        source,
        ByteText(_TEXT),
        batch,
        given.side,
        workers=workers,
        threads=threads,
      )
    loaders[_TORCH] = _torch(torch, file, given.side, batch, workers)
    for name, columns in _cached(given.side).items():
      cache = write_cache(pathlib.Path(folder) / name, columns)
      loaders[f'cache of {name}'] = make_loader(
        cache, None, batch, given.side, workers=workers, threads=1
      )
    speeds = _speeds(loaders, given.records, batch, given.repeats)
  base = statistics.median(speeds[_TORCH])
  fly = max(statistics.median(v) for k, v in speeds.items() if k[:4] == 'scar')
  rows = [
    {
      'loader': name,
      'images_per_second': statistics.median(some),
      'images_per_second_per_worker': statistics.median(some) / workers,
      'ratio_to_torch': statistics.median(some) / base,
      'ratio_to_fly': statistics.median(some) / fly,
      'lowest': min(some),
      'highest': max(some),
    }
    for name, some in speeds.items()
  ]
  settings = {
    'cores': os.cpu_count(),
    'torch': torch.__version__,
    'batch': batch,
    **{k: given[k].value for k in ('workers', 'side', 'records', 'repeats')},
  }
  return Report(settings, rows, lambda row: row['loader'])


def _cached(side: int) -> dict[str, Columns]:
  """Name of a cache -> its columns, for tokens of 16 pixels and 120 ids."""
  grid, ids = side // 16, np.dtype(np.uint16)
  text = {
    'text': (np.dtype(np.int32), (_TEXT,)),
    'text_mask': (np.dtype(np.bool_), (_TEXT,)),
  }
  tokens = {**text, 'tokens': (ids, (grid**2,))}
  feature = (read_dtype('bfloat16'), (grid, grid, 768))
  picture = (np.dtype(np.uint8), (side, side, 3))
  return {
    'tokens': {**tokens, 'source_tokens': (ids, (grid, grid))},
    'tokens and features': {
      **tokens, 'features': feature, 'target_features': feature,
    },
    'tokens and pictures': {
      **tokens, 'condition': picture, 'target': picture,
    },
  }  # fmt: skip


def write_cache(folder: pathlib.Path, columns: Columns) -> Cache:
  """A cache of noise, as `scar tokenize` would leave it."""
  job = manifest.Job(_CACHED, 1, _CACHED, columns, {}, {})
  manifest.open_job(folder, job)
  rng, shard = np.random.default_rng(0), ShardWriter(folder / job.name_of(0))
  row = {
    name: rng.integers(0, 2, shape).astype(dtype)
    for name, (dtype, shape) in columns.items()
  }
  for _ in job.rows_of(0):
    shard.write(pack(columns, row))
  whole = {'mark': job.mark, **shard.close(), 'failed': []}
  manifest.write_json(manifest.shard_file(folder, job, 0), whole)
  manifest.finish(folder, job)
  return Cache(str(folder))


def write_pictures(folder: pathlib.Path, count: int) -> pathlib.Path:
  """A JSONL file of JPEG pictures with the detail of photographs."""
  rng = np.random.default_rng(0)
  width, height = _PICTURE
  lines = []
  for i in range(count):
    # Octaves of noise, from shading to grain, and shapes with sharp edges.
    picture = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
      small = rng.random((height >> (8 - octave), width >> (8 - octave), 3))
      image = Image.fromarray((255 * small).astype(np.uint8))
      layer = np.asarray(image.resize(_PICTURE), np.float32)
      picture += layer / 2**octave
      if octave == 3:
        picture += 80.0 * (layer[..., :1] > 128)
    stored = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    stored.save(folder / f'{i}.jpg', quality=92)
    lines.append(json.dumps({'image': f'{i}.jpg', 'text': 'a photo of noise'}))
  file = folder / 'train.jsonl'
  file.write_text('\n'.join(lines))
  return file


def _torch(
  torch: Any, file: pathlib.Path, side: int, batch: int, workers: int
) -> Any:
  """The same work as people write it for PyTorch."""
  cv2 = require('cv2', 'data')
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  encoder = ByteText(_TEXT)

  class Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
      return _EPOCHS * len(rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
      i %= len(rows)
      image = Image.open(file.parent / rows[i]['image']).convert('RGB')
      scale = side / min(image.size)
      size = (round(scale * image.width), round(scale * image.height))
      image = image.resize(size, Image.Resampling.LANCZOS)
      left, top = (image.width - side) // 2, (image.height - side) // 2
      array = np.asarray(image.crop((left, top, left + side, top + side)))
      edges = cv2.Canny(array, 100, 200)
      pictures = (array, np.repeat(edges[..., None], 3, axis=-1))
      ids, mask = encoder.encode(rows[i]['text'])
      target, condition = (
        torch.from_numpy(p.copy()).float().mul_(2 / 255).sub_(1)
        for p in pictures
      )
      return {
        'target': target,
        'condition': condition,
        'text': torch.from_numpy(ids),
        'text_mask': torch.from_numpy(mask),
      }

  return torch.utils.data.DataLoader(
    Pictures(), batch, shuffle=True, num_workers=workers, drop_last=True
  )


def _speeds(
  loaders: dict[str, Any], records: int, batch: int, repeats: int
) -> dict[str, list[float]]:
  """Images per second of each; they take turns, so that all meet the load."""
  batches = max(_AHEAD, records // batch)
  speeds: dict[str, list[float]] = {name: [] for name in loaders}
  for _ in range(repeats):
    for name, loader in loaders.items():
      stream = iter(loader)
      for _ in range(_AHEAD):
        next(stream)
      start = time.perf_counter()
      for _ in range(batches):
        next(stream)
      speeds[name].append(batches * batch / (time.perf_counter() - start))
      del stream  # ends the workers of PyTorch
      if hasattr(loader, 'close'):
        loader.close()
  return speeds
