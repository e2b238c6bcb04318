"""Cases C01, C02, C04, C05, C06 and every mode, container and orientation."""

import contextlib
import io
import json
import struct
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image, ImageFile

from scar_jax.data.records import RecordError
from scar_jax.data.transforms import decode, decode_label, load_image


@pytest.fixture(scope='module')
def expect(case):
  manifest = json.loads(case('manifest.json').read_text())
  return lambda name: manifest[name]['expect']


def encoded(image: Image.Image, form: str, **more) -> bytes:
  stream = io.BytesIO()
  image.save(stream, form, **more)
  return stream.getvalue()


def near(found, wanted, tolerance):
  found = np.asarray(found, int)
  assert (np.abs(found - np.asarray(wanted, int)) <= tolerance).all(), found


@pytest.mark.parametrize('name', ['c01_exif6.jpg', 'c01_exif5.jpg'])
def test_c01_exif_orientation(case, expect, name):
  wanted = expect('C01')[name]
  image = decode(case(name))
  assert image.shape == (wanted['height'], wanted['width'], 3)
  assert image.dtype == np.uint8
  corners = [image[y, x] for y in (4, -5) for x in (4, -5)]
  near(corners, wanted['corners_TL_TR_BL_BR'], wanted['tolerance'])


def test_c02_cmyk(case, expect):
  wanted = expect('C02')
  image = decode(case('c02_cmyk.jpg'))
  assert image.shape == (32, 32, 3)
  near(image[:, 4], wanted['left_rgb'], wanted['tolerance'])
  near(image[:, -4], wanted['right_rgb'], wanted['tolerance'])


def test_c04_depth_of_16_bits(case, expect):
  image = decode(case('c04_depth16.png'))
  bands = image[0, 2::4, 0]
  assert bands.tolist() == expect('C04')['as_8bit']
  assert (image == image[:1, :, :1]).all()
  array = np.array(expect('C04')['values16'], np.uint16)[None]
  assert decode(array)[0, :, 1].tolist() == expect('C04')['as_8bit']
  assert (
    decode(array.astype(np.float32) / 65535)[0, :, 2].tolist()
    == expect('C04')['as_8bit']
  )


def test_c05_label_keeps_class_numbers(case, expect):
  labels = decode_label(case('c05_seg_palette.png'))
  numbers, counts = np.unique(labels, return_counts=True)
  found = dict(zip(map(str, numbers), counts.tolist(), strict=True))
  assert found == expect('C05')['as_label']
  colours = decode(case('c05_seg_palette.png'))
  assert colours[12, 12].tolist() == expect('C05')['as_image_rgb_at_(12,12)']


def test_c05_jpeg_is_no_label(case):
  with pytest.raises(RecordError, match=r'c05_seg.*JPEG is lossy.*PNG'):
    decode_label(case('c05_seg_rgb_colours.jpg'))
  assert decode(case('c05_seg_rgb_colours.jpg')).shape == (16, 16, 3)
  rgb = encoded(Image.new('RGB', (4, 4)), 'PNG')
  with pytest.raises(RecordError, match='mode RGB holds no class numbers'):
    decode_label(rgb, 'x')


@pytest.mark.parametrize('bits', [2, 4])
def test_grey_labels_of_few_bits_are_not_stretched(bits):
  def chunk(kind, body):
    crc = zlib.crc32(kind + body)
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', crc)

  values = [0, 1, 2, 3]
  packed = sum(v << (32 - bits * (i + 1)) for i, v in enumerate(values))
  row = b'\0' + struct.pack('>I', packed)[: (4 * bits + 7) // 8]
  png = b'\x89PNG\r\n\x1a\n'
  png += chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 1, bits, 0, 0, 0, 0))
  png += chunk(b'IDAT', zlib.compress(row)) + chunk(b'IEND', b'')
  assert decode_label(png).tolist() == [values]


@pytest.mark.parametrize(
  ('name', 'reason'),
  [
    ('c06_truncated.jpg', 'truncated'),
    ('c06_zero_bytes.jpg', 'empty file'),
    ('c06_html_not_image.jpg', r'not an image.*<html>'),
    ('c06_absent.jpg', 'missing file'),
  ],
)
def test_c06_errors_name_file_and_reason(case, name, reason):
  with pytest.raises(RecordError, match=f'{name}.*{reason}') as error:
    decode(case(name))
  assert name in error.value.key


def test_c06_the_whole_file_decodes(case):
  assert decode(case('c06_whole.jpg')).shape == (96, 96, 3)


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF', 'BMP'])
@pytest.mark.parametrize('progressive', [False, True])
def test_a_cut_file_is_an_error_or_whole(form, progressive):
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (24, 40, 3), np.uint8))
  whole = encoded(picture, form, progressive=progressive)
  wanted = decode(whole)
  for cut in range(1, len(whole), 7):
    try:
      found = decode(whole[:cut])
    except RecordError:
      continue
    # Only bytes behind the last pixel may go missing unnoticed.
    assert (found == wanted).all(), f'{form} cut at {cut} of {len(whole)}'


def test_half_pictures_never_pass(monkeypatch, case):
  monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
  with pytest.raises(RecordError, match='LOAD_TRUNCATED_IMAGES'):
    decode(case('c06_truncated.jpg'))


def test_too_many_pixels_is_an_error():
  bomb = encoded(Image.new('1', (10000, 8001)), 'PNG')
  with pytest.raises(RecordError, match='10000x8001 pixels; accepted: 1 to'):
    decode(bomb, 'bomb.png')


MODES = {
  # mode -> (pixel, expected RGB)
  '1': (1, (255, 255, 255)),
  'L': (77, (77, 77, 77)),
  'LA': ((0, 128), (127, 127, 127)),
  'P': (3, (3, 3, 3)),
  'RGB': ((10, 20, 30), (10, 20, 30)),
  'RGBA': ((255, 0, 0, 51), (255, 204, 204)),
  'CMYK': ((0, 255, 255, 0), (255, 0, 0)),
  'YCbCr': ((128, 128, 128), (128, 128, 128)),
  'HSV': ((0, 0, 255), (255, 255, 255)),
  'LAB': ((255, 128, 128), (255, 255, 255)),
  'I': (25700, (100, 100, 100)),
  'I;16': (25700, (100, 100, 100)),
  'I;16B': (25700, (100, 100, 100)),
  'F': (0.2, (51, 51, 51)),
  'RGBX': ((1, 2, 3, 0), (1, 2, 3)),
  'RGBa': ((51, 0, 0, 51), (255, 204, 204)),
  'La': ((0, 128), (127, 127, 127)),
}


@pytest.mark.parametrize('mode', MODES)
def test_every_mode_becomes_rgb(mode):
  pixel, wanted = MODES[mode]
  image = Image.new(mode, (3, 2), pixel)
  if mode == 'P':
    image.putpalette([v for i in range(256) for v in (i, i, i)])
  found = decode(image, mode)
  assert found.shape == (2, 3, 3)
  assert found.dtype == np.uint8
  near(found, np.broadcast_to(wanted, found.shape), 1)


FORMS = {
  'PNG': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'),
  'JPEG': ('L', 'RGB', 'CMYK'),
  'GIF': ('L', 'P', 'RGB', 'RGBA'),
  'WEBP': ('RGB', 'RGBA'),
  'TIFF': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'F', 'I'),
  'BMP': ('1', 'L', 'P', 'RGB'),
  'PPM': ('1', 'L', 'RGB', 'I'),
}


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
  form_mode=st.sampled_from([(f, m) for f in FORMS for m in FORMS[f]]),
  orientation=st.integers(0, 9),
  width=st.integers(1, 40),
  height=st.integers(1, 40),
)
def test_modes_containers_orientations(form_mode, orientation, width, height):
  form, mode = form_mode
  pixel, wanted = MODES[mode]
  image = Image.new(mode, (width, height), pixel)
  if mode == 'P':
    image.putpalette([v for i in range(256) for v in (i, i, i)])
  more = {}
  if form in ('PNG', 'JPEG', 'WEBP', 'TIFF'):
    exif = Image.Exif()
    exif[274] = orientation
    more['exif'] = exif
  turned = bool(more) and 5 <= orientation <= 8
  found = decode(encoded(image, form, **more), form)
  assert found.shape == ((width, height) if turned else (height, width)) + (3,)
  if not (form == 'GIF' and mode == 'RGBA'):  # GIF knows no half transparency
    near(found, np.broadcast_to(wanted, found.shape), 6)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'WEBP'])
def test_orientations_turn_exactly(orientation, form):
  stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
  turns = {
    1: stored,
    2: stored[:, ::-1],
    3: stored[::-1, ::-1],
    4: stored[::-1],
    5: stored.T,
    6: stored[::-1].T,
    7: stored[::-1, ::-1].T,
    8: stored.T[::-1],
  }
  exif = Image.Exif()
  exif[274] = orientation
  more = {'lossless': True} if form == 'WEBP' else {}
  image = Image.fromarray(np.repeat(stored[..., None], 3, -1))
  content = encoded(image, form, exif=exif, **more)
  assert decode(content)[..., 0].tolist() == turns[orientation].tolist()
  assert load_image(content).image.getexif().get(274, 1) == 1


def test_transparency_by_palette_and_colour_key_is_white():
  palette = Image.new('P', (2, 1), 1)
  palette.putpalette([0, 0, 0, 9, 9, 9])
  palette.putpixel((0, 0), 0)
  png = encoded(palette, 'PNG', transparency=0)
  assert decode(png).tolist() == [[[255] * 3, [9] * 3]]
  keyed = encoded(
    Image.new('RGB', (1, 1), (1, 2, 3)), 'PNG', transparency=(1, 2, 3)
  )
  assert decode(keyed).tolist() == [[[255] * 3]]


@pytest.mark.parametrize('form', ['GIF', 'PNG', 'WEBP', 'TIFF'])
def test_animations_give_their_first_frame(form):
  frames = [Image.new('RGB', (4, 4), c) for c in ('#ff0000', '#0000ff')]
  more = {'lossless': True} if form == 'WEBP' else {}
  movie = encoded(
    frames[0], form, save_all=True, append_images=frames[1:], **more
  )
  assert decode(movie)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
  ('array', 'reason'),
  [
    (np.zeros((2, 2, 5), np.uint8), r'shape \(2, 2, 5\)'),
    (np.zeros((0, 2), np.uint8), r'shape \(0, 2, 1\)'),
    (np.full((2, 2), np.nan, np.float32), 'from nan to nan'),
    (np.full((2, 2), 1.5, np.float32), r'1\.5 to 1\.5'),
    (np.full((2, 2), 70000, np.int32), '70000'),
    (np.zeros((2, 2), 'U1'), 'no picture'),
  ],
)
def test_arrays_outside_the_stated_range(array, reason):
  with pytest.raises(RecordError, match=reason):
    decode(array, 'a')


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
  content=st.binary(max_size=200),
  start=st.sampled_from(
    [
      b'',
      b'\x89PNG\r\n\x1a\n',
      b'\xff\xd8\xff\xe0',
      b'GIF89a',
      b'RIFF',
      b'II*\0',
    ]
  ),
)
def test_any_bytes_give_a_record_error_or_a_picture(content, start):
  with contextlib.suppress(RecordError):
    assert decode(start + content).dtype == np.uint8


def test_boolean_arrays_are_black_and_white():
  array = np.array([[True, False]])
  assert decode(array).tolist() == [[[255] * 3, [0] * 3]]
  assert decode(array[..., None].repeat(3, -1)).max() == 255


def test_wrong_types_are_named():
  with pytest.raises(RecordError, match='int is no picture'):
    decode(3)
