"""200 files damaged in 20 ways among 2,000: each is named, none is used."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

from scar_jax.data.fields import Fields
from scar_jax.data.pipeline import make_loader
from scar_jax.data.sources.jsonl import Jsonl

GOOD, BAD = 1800, 10  # files; files of each kind of damage


def encoded(form, side=12, **more):
  rng = np.random.default_rng(side)
  image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
  stream = io.BytesIO()
  image.save(stream, form, **more)
  return stream.getvalue()


def chunk(kind, content=b''):
  crc = struct.pack('>I', zlib.crc32(kind + content))
  return struct.pack('>I', len(content)) + kind + content + crc


def huge_png():
  size = struct.pack('>IIBBBBB', 100_000, 100_000, 8, 2, 0, 0, 0)
  start = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', size)
  return start + chunk(b'IDAT') + chunk(b'IEND')


def damages():
  """Kind of damage -> content; None is a file that is not there."""
  png, jpeg = encoded('PNG'), encoded('JPEG', 64, quality=95)
  webp, gif, bmp = encoded('WEBP'), encoded('GIF'), encoded('BMP')
  tiff = encoded('TIFF', compression='tiff_deflate')
  middle = png.index(b'IDAT') + 8
  return {
    'missing': None,
    'empty': b'',
    'one byte': b'\x89',
    'html': b'<html><body>404 Not Found</body></html>',
    'text': b'version https://git-lfs.github.com/spec/v1\nsize 1\n',
    'json': b'{"error": "quota"}',
    'zeros': bytes(500),
    'noise': np.random.default_rng(1).bytes(500),
    'half a jpeg': jpeg[: len(jpeg) // 2],
    'jpeg without its end': jpeg[:-200],
    'jpeg header only': jpeg[:20],
    'half a png': png[: len(png) // 2],
    'png header only': png[:40],
    'png with flipped bits': png[:middle] + bytes(
      b ^ 0xFF for b in png[middle : middle + 30]
    ) + png[middle + 30 :],
    'png bomb': huge_png(),
    'half a webp': webp[: len(webp) // 2],
    'gif header only': gif[:13],
    'half a bmp': bmp[: len(bmp) // 2],
    'tiff without pixels': tiff[:8],
    'gzip': zlib.compress(png),
  }  # fmt: skip


def test_each_damaged_file_is_named_with_its_reason(tmp_path):
  kinds = damages()
  assert len(kinds) == 20
  names = {}
  good = encoded('PNG', 8)
  for i in range(GOOD):
    names[f'good{i}.png'] = ''
    (tmp_path / f'good{i}.png').write_bytes(good)
  for number, (kind, content) in enumerate(kinds.items()):
    for i in range(BAD):
      name = f'bad{number}_{i}.png'
      names[name] = kind
      if content is not None:
        (tmp_path / name).write_bytes(content)
  order = np.random.default_rng(0).permutation(len(names))
  listed = [list(names)[i] for i in order]
  lines = '\n'.join(json.dumps({'image': name}) for name in listed)
  (tmp_path / 'train.jsonl').write_text(lines)
  source = Jsonl(tmp_path / 'train.jsonl', Fields('image'))
  loader = make_loader(
    source, None, 100, 8, train=False, max_bad_share=0.2, workdir=tmp_path
  )
  valid = {}
  for batch in loader:
    for index, used in zip(batch['index'], batch['valid'], strict=True):
      valid[listed[index]] = bool(used)
  assert len(valid) == 2000
  assert {n for n, used in valid.items() if not used} == {
    n for n, kind in names.items() if kind
  }
  report = (tmp_path / 'bad_records.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in report]
  assert len(rows) == 200
  for row in rows:
    line = int(row['key'].rsplit(':', 1)[1])
    assert listed[line - 1] in row['reason']
    assert len(row['reason']) > len(listed[line - 1]) + 10
