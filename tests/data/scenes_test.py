import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scar_jax.config import DataConfig
from scar_jax.data.sources import make_source, scenes, scenes_text
from scar_jax.data.sources.scenes import Item, Scene, Scenes, ScenesConfig


def _mask_rows(*args):
  return [''.join('.X'[int(v)] for v in r) for r in scenes.shape_mask(*args)]


def test_shapes_are_these_pixels():
  assert _mask_rows('diamond', 'large', 8) == [
    '...XX...',
    '..XXXX..',
    '.XXXXXX.',
    'XXXXXXXX',
    'XXXXXXXX',
    '.XXXXXX.',
    '..XXXX..',
    '...XX...',
  ]
  assert _mask_rows('triangle', 'small', 8)[1:7] == [
    '...XX...',
    '...XX...',
    '..XXXX..',
    '..XXXX..',
    '.XXXXXX.',
    '.XXXXXX.',
  ]
  assert _mask_rows('cross', 'small', 8)[1:7] == [
    '.XX..XX.',
    '..XXXX..',
    '...XX...',
    '...XX...',
    '..XXXX..',
    '.XX..XX.',
  ]
  assert scenes.shape_mask('square', 'large', 8).all()


def test_item_is_a_function_of_split_and_number_only():
  source = Scenes()
  first = source.load(12345)
  again = pickle.loads(pickle.dumps(source))
  again.load(7)
  second = again.load(12345, np.random.default_rng(1))
  np.testing.assert_array_equal(first.target, second.target)
  np.testing.assert_array_equal(first.condition, second.condition)
  assert (first.text, first.key) == (second.text, 'scenes/train/12345')
  other = Scenes(ScenesConfig(split='seen')).load(345)
  assert other.meta['before'] != Scenes().load(345).meta['before']


def _acted_on(record):
  """The held-out rule's object: gone from `before`, or new in `after`."""
  before, after = (set(record.meta[k].items) for k in ('before', 'after'))
  if record.meta['kind'] == 'add':
    return (after - before).pop()
  return (before - after).pop()


@pytest.mark.parametrize('split', scenes.SPLITS)
def test_splits_share_no_combination(split):
  source = Scenes(ScenesConfig(split=split))
  for i in range(300):
    record = source.load(i)
    held_out = scenes.is_held_out(record.meta['kind'], _acted_on(record))
    assert held_out == (split == 'held_out')


@pytest.mark.parametrize(
  ('split', 'moved', 'removed'), [('train', 30, 10), ('held_out', 18, 18)]
)
def test_places_are_trained_on_more_than_they_are_scored(split, moved, removed):
  source = Scenes(ScenesConfig(split=split))
  kinds = [source.load(i).meta['kind'] for i in range(90)]
  assert kinds.count('move') == kinds.count('add') == moved
  assert kinds.count('remove') == kinds.count('resize') == removed


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 199_999))
def test_edit_changes_what_it_says_and_no_more(i):
  record = Scenes().load(i)
  before, after = record.meta['before'], record.meta['after']
  kind = record.meta['kind']
  assert kind in scenes.KINDS
  assert len(after.items) - len(before.items) == {'add': 1, 'remove': -1}.get(
    kind, 0
  )
  same = (record.target == record.condition).all(-1)
  assert same[record.mask == 0].all()
  cells_changed = {'move': 2}.get(kind, 1)
  assert (record.mask > 0).sum() == 64 * cells_changed
  assert not same[record.mask > 0].all()
  looks = [(it.shape, it.colour) for it in after.items]
  assert len(set(looks)) == len(looks)
  assert len({it.place for it in after.items}) == len(looks)
  old = _acted_on(record)
  if kind in ('recolour', 'resize', 'move'):
    (new,) = set(after.items) - set(before.items)
    field = {'recolour': ('colour',), 'resize': ('size',)}.get(
      kind, ('row', 'col')
    )
    assert new == old._replace(**{f: getattr(new, f) for f in field})


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 199_999))
def test_instruction_fits_one_object_and_is_short(i):
  record = Scenes().load(i)
  assert 0 < len(record.text.encode()) <= 39
  if record.meta['kind'] == 'add':
    return
  named = [w for w in record.text.split() if w in scenes.SHAPES]
  # In 'make the red square blue' the colour before the noun is the object's.
  head = record.text.split('the ', 1)[1].split()[:2]
  fits = [
    it
    for it in record.meta['before'].items
    if (not named or it.shape == named[0])
    and (head[0] not in scenes.COLOURS or it.colour == head[0])
  ]
  assert fits == [_acted_on(record)]


def test_texts_name_the_outcome():
  texts = {}
  for i in range(400):
    record = Scenes().load(i)
    new = set(record.meta['after'].items) - set(record.meta['before'].items)
    texts.setdefault(record.meta['kind'], []).append((record.text, new))
  for text, (new,) in texts['recolour']:
    assert text.split()[-1] == new.colour
  for text, (new,) in texts['add']:
    assert f'a {new.size} {new.colour} {new.shape} at ' in text
    name = text.split(' at ')[1]
    assert name in scenes_text.cell_names(new.row, new.col, 4)
  for text, (new,) in texts['resize']:
    grows = any(w in text for w in ('large', 'enlarge', 'bigger'))
    assert grows == (new.size == 'large')


def test_moves_one_step_or_to_a_named_cell():
  source = Scenes(ScenesConfig(split='held_out'))
  for i in range(1, 1000, 5):
    record = source.load(i)
    assert record.meta['kind'] == 'move'
    old = _acted_on(record)
    (new,) = set(record.meta['after'].items) - set(record.meta['before'].items)
    if ' at ' in record.text or ' to ' in record.text:
      name = record.text.replace(' to ', ' at ').split(' at ')[1]
      assert name in scenes_text.cell_names(new.row, new.col, 4)
    else:
      steps = dict(up=(-1, 0), down=(1, 0), left=(0, -1), right=(0, 1))
      step = steps[record.text.split()[-1]]
      assert (new.row - old.row, new.col - old.col) == step


def test_cell_names():
  assert scenes_text.cell_names(0, 0, 4) == ['a1', 'top left']
  assert scenes_text.cell_names(3, 3, 4) == ['d4', 'bottom right']
  assert scenes_text.cell_names(1, 3, 4) == ['d2']


def test_control_maps_have_exact_values():
  scene = Scene((Item('square', 'red', 'small', 0, 1),))
  seg = scenes.control_map(scene, 'segmentation')
  assert (seg[1:7, 9:15] == scenes.SEGMENTS[0]).all()
  assert seg.astype(int).sum() == 36 * sum(scenes.SEGMENTS[0])
  depth = scenes.control_map(scene, 'depth')
  assert set(np.unique(depth)) == {40, 150}
  edges = scenes.control_map(scene, 'edges')
  assert (edges[..., 0] == 255).sum() == 20  # the rim of 6 x 6
  assert edges[2, 9].tolist() == [255] * 3
  assert edges[2, 10].tolist() == [0] * 3
  with pytest.raises(ValueError, match=r"no map 'hed'; accepted: edges, seg"):
    scenes.control_map(scene, 'hed')


def test_control_text_lists_colours_in_reading_order():
  source = Scenes(ScenesConfig(kind='control'))
  for i in range(30):
    record = source.load(i)
    assert record.meta['kind'] == scenes.MAPS[i % 3]
    items = record.meta['after'].items
    assert [it.place for it in items] == sorted(it.place for it in items)
    assert record.text == ', '.join(it.colour for it in items)


def test_registry_builds_it_with_labels_of_cells():
  cfg = DataConfig(source='scenes', kind='image', image_size=64)
  source = make_source(cfg, 'seen')
  record = source.load(3)
  assert record.target.shape == (64, 64, 3)
  assert record.condition is None
  assert record.text == ''
  labels = record.meta['labels']
  assert len(labels) == 16
  for item in record.meta['after'].items:
    assert labels[f'cell_{item.row}_{item.col}'] == scenes.class_id(item)
  assert sum(v > 0 for v in labels.values()) == len(record.meta['after'].items)


def test_classes_are_a_bijection():
  items = [
    Item(s, c, z, 0, 0)
    for s in scenes.SHAPES
    for c in scenes.COLOURS
    for z in scenes.SIZES
  ]
  ids = sorted(map(scenes.class_id, items))
  assert ids == list(range(1, scenes.NUM_CLASSES))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(kind='edits'), r"kind='edits' is unknown; accepted: edit, control"),
    (dict(split='val'), r"split='val' is unknown; accepted: train, seen, held"),
    (dict(image_size=36), r'image_size=36 .* accepted: multiples of 8 from 32'),
    (dict(max_items=16), r'max_items=16; accepted: 1 to 15'),
    (dict(backgrounds=4), r'backgrounds=4; accepted: 1 to 3'),
  ],
)
def test_refuses_impossible_settings(change, message):
  with pytest.raises(ValueError, match=message):
    ScenesConfig(**change)


def test_number_out_of_range():
  with pytest.raises(IndexError, match='item 1000 of 1000'):
    Scenes(ScenesConfig(split='seen')).load(1000)


def test_the_class_is_the_colour_that_no_map_shows():
  source = scenes.Scenes(scenes.ScenesConfig(kind='class'))
  records = [source.load(i) for i in range(30)]
  assert {r.meta['kind'] for r in records} == set(scenes.MAPS)
  assert len({r.label for r in records}) == len(scenes.COLOURS)
  for record in records:
    scene = record.meta['after']
    colours = {item.colour for item in scene.items}
    assert colours == {tuple(scenes.COLOURS)[record.label]}
    other = scene._replace(
      items=tuple(item._replace(colour='black') for item in scene.items)
    )
    for name in scenes.MAPS:
      np.testing.assert_array_equal(
        scenes.control_map(scene, name), scenes.control_map(other, name)
      )
