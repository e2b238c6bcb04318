import shutil

import numpy as np
import pytest
from PIL import Image
from scar_setup import finished_runs

from scar_jax.artifacts import find_part
from scar_jax.data.transforms import unletterbox
from scar_jax.editor import Editor
from scar_jax.editor_inputs import control_map
from scar_jax.models import unstacked


@pytest.fixture(scope='module')
def work(tmp_path_factory):
  """`runs/` with the work directories of three finished runs."""
  return finished_runs(tmp_path_factory.mktemp('made') / 'runs')


@pytest.fixture(scope='module')
def editor(work):
  return Editor.load(work / 'scar_run')


def _picture(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def _same(a, b):
  return np.array_equal(np.asarray(a), np.asarray(b))


def test_any_picture_gives_a_picture_of_its_size(editor, case):
  paths = [case('c02_cmyk.jpg'), case('c08_37x53.png'), case('c01_exif6.jpg')]
  pictures = [*paths, Image.new('L', (5, 9)), _picture(8, 8)]
  made = editor(pictures, 'make it red')
  upright = (32, 48)  # after the EXIF turn
  sizes = [Image.open(p).size for p in paths[:2]]
  assert [m.size for m in made] == [*sizes, upright, (5, 9), (8, 8)]
  assert all(isinstance(m, Image.Image) and m.mode == 'RGB' for m in made)


def test_one_picture_and_one_prompt_need_no_list(editor):
  (alone,) = editor(_picture(6, 7), 'red')
  (listed,) = editor([_picture(6, 7)], ['red'])
  assert _same(alone, listed)


def test_a_request_depends_on_nothing_but_itself(editor):
  pictures = [_picture(8, 8, i) for i in range(4)]
  prompts = ['a', 'b', 'c', 'd']
  together = editor(pictures, prompts, seed=[5, 6, 7, 8])
  turned = editor(pictures[::-1], prompts[::-1], seed=[8, 7, 6, 5])
  assert all(_same(a, b) for a, b in zip(together, turned[::-1], strict=True))
  (alone,) = editor(pictures[2], 'c', seed=7)
  assert _same(alone, together[2])
  counted = editor(pictures, prompts, seed=5)
  assert all(_same(a, b) for a, b in zip(together, counted, strict=True))


def test_layers_read_apart_give_the_same_pictures(editor, work, monkeypatch):
  monkeypatch.setattr(unstacked, '_LARGE', 0)  # all are large
  apart = Editor.load(work / 'scar_run')
  _, _, frozen = apart.networks
  assert 'layer_0' in frozen['encoder']['network']
  pictures = [_picture(8, 8, i) for i in range(2)]
  made = apart(pictures, 'make it red', seed=3)
  want = editor(pictures, 'make it red', seed=3)
  assert all(_same(a, b) for a, b in zip(made, want, strict=True))


def test_few_programs_serve_every_count_size_and_strength(editor):
  editor(_picture(8, 8), 'x', guidance=2.0)
  editor([_picture(8, 8)] * 3, 'x', guidance=2.0)
  before = editor.programs.traced
  assert editor.buckets == (1, 2, 3)
  for count, scale in ((1, 3.0), (3, 4.5), (4, 2.5), (7, 2.0)):
    assert len(editor([_picture(9, 4)] * count, 'x', guidance=scale)) == count
  [cold] = editor(_picture(8, 8), 'x', guidance=2.0, temperature=1e-4)
  assert editor.programs.traced == before
  [greedy] = editor(_picture(8, 8), 'x', guidance=2.0, temperature=0.0)
  assert editor.programs.traced == before + 1
  assert _same(cold, greedy)


def test_an_empty_prompt_is_the_null_condition(editor):
  (empty,) = editor(_picture(8, 8), '', guidance=2.0)
  (none,) = editor(_picture(8, 8), None, guidance=7.0)
  (blank,) = editor(_picture(8, 8), '  \n', guidance=4.0)
  assert _same(empty, none)  # nothing is left for guidance to push away from
  assert _same(empty, blank)


def test_streamed_pictures_grow_into_those_of_a_call(editor):
  pictures = [_picture(8, 8), _picture(5, 9)]
  given = dict(seed=4, temperature=1.0, output='array')
  grown = list(editor.stream(pictures, ['a', 'b'], **given))
  made = editor(pictures, ['a', 'b'], **given)
  assert [(g.done, g.total) for g in grown] == [(2, 4), (4, 4)]
  assert all(_same(*pair) for pair in zip(grown[-1].images, made, strict=True))
  # What is not drawn yet is the picture below.
  np.testing.assert_array_equal(grown[0].images[0][4:], pictures[0][4:])
  with pytest.raises(ValueError, match='4 requests to stream; accepted: what'):
    list(editor.stream([_picture(8, 8)] * 4, 'a'))


def test_several_pictures_of_a_request(editor):
  pictures, told = [_picture(8, 8), _picture(6, 9)], []
  made = editor(
    pictures, ['a', 'b'], num_images=2, seed=[1, 2, 3, 4], temperature=1.0,
    progress=lambda *done: told.append(done),
  )  # fmt: skip
  apart = editor(
    [pictures[i] for i in (0, 0, 1, 1)], list('aabb'), seed=[1, 2, 3, 4],
    temperature=1.0,
  )  # fmt: skip
  assert all(_same(*pair) for pair in zip(made, apart, strict=True))
  assert told == [(2, 4), (4, 4)]
  many = editor(pictures[0], 'a', num_images=5, seed=1, temperature=1.0)
  assert len(many) == 5
  assert _same(many[1], made[1])
  with pytest.raises(ValueError, match='num_images=0; accepted: 1 or more'):
    editor(pictures[0], 'a', num_images=0)


def test_a_control_map_is_made_of_a_photo(editor):
  photo = np.zeros((20, 40, 3), np.uint8)
  photo[5:15, 10:30] = 255
  drawn, box = control_map('canny', photo, editor.cfg.image_size)
  assert 0 < (drawn == 255).mean() < 1
  [made] = editor(photo, 'x', control='canny', output='array')
  [same] = editor(drawn, 'x', output='array')
  np.testing.assert_array_equal(made, unletterbox(same, box))
  with pytest.raises(ValueError, match=r"'seg' is given as a picture, not dr"):
    editor(photo, 'x', control='seg')


def test_unknown_settings_are_named(editor):
  with pytest.raises(ValueError, match='guiding: no setting of the sampler'):
    editor(_picture(8, 8), 'x', guiding=2.0)
  with pytest.raises(ValueError, match="output='jpg'; accepted: pil, array"):
    editor(_picture(8, 8), 'x', output='jpg')


def test_a_moved_run_is_found(work, tmp_path, editor):
  moved = tmp_path / 'elsewhere'
  shutil.copytree(work, moved)
  gone = Editor.load(moved / 'scar_run').cfg.tokenizer
  assert find_part(gone, moved / 'scar_run' / 'artifact') == gone
  lost = str(tmp_path / 'lost' / 'tokenizer_run')
  found = find_part(lost, moved / 'scar_run' / 'artifact')
  assert found == str(moved / 'tokenizer_run')
  with pytest.raises(ValueError, match=r"'nowhere' not found; tried .*tokeniz"):
    find_part('nowhere', moved / 'scar_run')
  other = Editor.load(
    moved / 'scar_run' / 'artifact',
    tokenizer=str(moved / 'tokenizer_run'),
    encoder=str(moved / 'encoder_run'),
    batch=editor.cfg.batch,
  )
  assert _same(other(_picture(8, 8), 'x')[0], editor(_picture(8, 8), 'x')[0])


def test_bad_requests_are_errors(editor, work, case):
  with pytest.raises(ValueError, match='2 prompts for 3 requests; accepted: 1'):
    editor([_picture(4, 4)] * 3, ['a', 'b'])
  with pytest.raises(ValueError, match='0 images for 1 requests'):
    editor(None, 'a')
  with pytest.raises(ValueError, match='2 seeds for 1 pictures'):
    editor(_picture(4, 4), 'a', seed=[1, 2])
  with pytest.raises(ValueError, match=r'sample\.top_p=1.2; accepted'):
    editor(_picture(4, 4), 'a', top_p=1.2)
  with pytest.raises(ValueError, match="'image_text' needs null conditions"):
    editor(_picture(4, 4), 'a', guidance_image=1.5)
  with pytest.raises(ValueError, match='c06_zero_bytes'):
    editor(case('c06_zero_bytes.jpg'), 'a')
  with pytest.raises(ValueError, match=r"'tokenizer' artifact; wanted: scar"):
    Editor.load(work / 'tokenizer_run')
