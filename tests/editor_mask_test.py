"""Inpainting through the editor and `scar edit --mask`."""

import json

import numpy as np
import pytest
from PIL import Image
from scar_setup import finished_runs

from scar_jax.cli import main
from scar_jax.editor import Editor


@pytest.fixture(scope='module')
def work(tmp_path_factory):
  """A model of the random order on 4 x 4 tokens of 4 pixels."""
  return finished_runs(
    tmp_path_factory.mktemp('inpainting') / 'runs',
    order__name='random',
    order__num_sets=3,
    data__image_size=16,
  )


@pytest.fixture(scope='module')
def editor(work):
  return Editor.load(work / 'scar_run', buckets=[3])


def _picture(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def _corner(height, width, share=0.5):
  mask = np.zeros((height, width), bool)
  mask[: int(height * share), : int(width * share)] = True
  return mask


@pytest.mark.parametrize('size', [(16, 16), (37, 53), (5, 40)])
def test_pixels_outside_the_mask_are_kept_exactly(editor, size):
  picture, mask = _picture(*size), _corner(*size)
  [made] = editor(picture, 'red', masks=mask)
  made = np.asarray(made)
  assert made.shape == picture.shape
  np.testing.assert_array_equal(made[~mask], picture[~mask])
  assert (made[mask] != picture[mask]).mean() > 0.5


def test_known_tokens_stay_and_the_others_are_drawn(editor, monkeypatch):
  seen = []
  decoded = editor._decode

  def spy(parts, frozen, tokens, latent):
    seen.append(np.asarray(tokens))
    return decoded(parts, frozen, tokens, latent)

  monkeypatch.setattr(editor, '_decode', spy)
  picture, mask = _picture(16, 16), _corner(16, 16)
  for seed in (1, 2):
    *_, last = editor.stream(picture, 'red', masks=mask, seed=seed)
    [made] = editor(picture, 'red', masks=mask, seed=seed)
    np.testing.assert_array_equal(last.images[0], made)
  canvas = np.stack([picture] * 3).astype(np.float32) * (2 / 255) - 1
  parts, _, frozen = editor.networks
  known = np.asarray(editor._tokens(parts, frozen, canvas)).reshape(3, 16)
  keep = np.ones((4, 4), bool)
  keep[:2, :2] = False
  for tokens in seen:
    np.testing.assert_array_equal(
      tokens[:, keep.reshape(-1)], known[:, keep.reshape(-1)]
    )
  first, second = seen[len(seen) // 2 - 1], seen[-1]
  assert (first != second).any()


def test_an_all_white_mask_is_an_ordinary_edit(editor):
  for size in ((16, 16), (9, 20)):
    picture = _picture(*size)
    [masked] = editor(picture, 'red', masks=np.ones(size, bool), seed=3)
    [plain] = editor(picture, 'red', seed=3)
    np.testing.assert_array_equal(masked, plain)


def test_masks_of_all_sizes_share_few_programs_and_no_result(editor):
  pictures = [_picture(16, 16, i) for i in range(6)]
  masks = []
  for i in range(6):
    mask = np.zeros((4, 4), bool)
    mask.reshape(-1)[: i + 2] = True
    masks.append(np.kron(mask, np.ones((4, 4), bool)))
  alone = {0: editor(pictures[0], 'x', masks=masks[0], seed=7)}
  before = editor.programs.traced
  together = editor(pictures, 'x', masks=masks, seed=[7] * 6)
  # 14 tokens entered at once; of the others 12, 12, 10, 10 and 8.
  assert editor.programs.traced - before <= 3
  for i in (2, 5):
    alone[i] = editor(pictures[i], 'x', masks=masks[i], seed=7)
  for i, [made] in alone.items():
    np.testing.assert_array_equal(made, together[i])


def test_bad_masks_are_errors(editor, work, tmp_path, case):
  picture = _picture(16, 16)
  with pytest.raises(ValueError, match=r'mask 0: a mask of 8x16 pixels for a'):
    editor(picture, 'x', masks=np.ones((16, 8), bool))
  with pytest.raises(ValueError, match='mask 0: the mask has no white pixel'):
    editor(picture, 'x', masks=np.zeros((16, 16), bool))
  with pytest.raises(ValueError, match=r'c06_zero_bytes\.jpg: empty file'):
    editor(picture, 'x', masks=case('c06_zero_bytes.jpg'))
  with pytest.raises(ValueError, match="control='canny' with masks"):
    editor(picture, 'x', control='canny', masks=picture)
  with pytest.raises(ValueError, match='2 masks for 3 requests'):
    editor([picture] * 3, 'x', masks=[_corner(16, 16)] * 2)
  raster = Editor.load(finished_runs(tmp_path / 'raster') / 'scar_run')
  with pytest.raises(ValueError, match=r"mask='given' for .*'raster', wh"):
    raster(picture, 'x', masks=_corner(16, 16))
  with pytest.raises(ValueError, match=r"sample\.num_sets=4 for .* 'raster'"):
    raster(picture, 'x', num_sets=4)


def test_the_command_takes_a_mask_and_a_number_of_steps(work, tmp_path, capsys):
  picture, mask = _picture(20, 16), _corner(20, 16)
  Image.fromarray(picture).save(tmp_path / 'in.png')
  Image.fromarray(mask).save(tmp_path / 'mask.png')
  words = [
    'edit', f'--workdir={work}/scar_run', f'--image={tmp_path}/in.png',
    f'--mask={tmp_path}/mask.png', f'--out={tmp_path}/out.png', '--prompt=red',
  ]  # fmt: skip
  more = ['--num-sets=2', '--schedule=confidence', '--ramp=tokens']
  assert main([*words, *more]) == 0
  made = np.asarray(Image.open(tmp_path / 'out.png'))
  np.testing.assert_array_equal(made[~mask], picture[~mask])
  assert main([*words, '--num_sets=17']) == 1
  message = capsys.readouterr().err
  assert 'num_sets=17 for 16 tokens; accepted: 1 to 16' in message


def test_requests_may_have_masks(work, tmp_path, capsys):
  picture, mask = _picture(20, 16), _corner(20, 16)
  Image.fromarray(picture).save(tmp_path / 'in.png')
  Image.fromarray(mask).save(tmp_path / 'mask.png')
  Image.fromarray(mask[:9]).save(tmp_path / 'small.png')
  rows = [
    {'id': 'part', 'image': 'in.png', 'mask': 'mask.png', 'seed': 1},
    {'id': 'whole', 'image': 'in.png', 'seed': 1},
    {'id': 'alone', 'mask': 'mask.png'},
    {'id': 'size', 'image': 'in.png', 'mask': 'small.png'},
    {'id': 'kind', 'image': 'in.png', 'mask': 3},
  ]
  file = tmp_path / 'r.jsonl'
  file.write_text('\n'.join(json.dumps(row) for row in rows))
  out = tmp_path / 'out'
  words = [f'--workdir={work}/scar_run', f'--requests={file}', f'--out={out}']
  assert main(['sample', *words]) == 1
  message = capsys.readouterr().err
  assert '3 of 5 requests could not be made' in message
  assert 'line 3: a mask without an image; accepted: both' in message
  assert 'a mask of 16x9 pixels for a picture of 16x20' in message
  assert 'line 5: mask 3; accepted: a path' in message
  part, whole = (
    np.asarray(Image.open(out / f'{name}.png')) for name in ('part', 'whole')
  )
  np.testing.assert_array_equal(part[~mask], picture[~mask])
  assert (whole[~mask] != picture[~mask]).any()
