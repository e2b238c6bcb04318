"""`scar controls` on folders and on data sets."""

import json

import numpy as np
import pytest
from PIL import Image

from scar_jax import annotate
from scar_jax.cli import main
from scar_jax.data import controls


@pytest.fixture
def pictures(tmp_path):
  """Three pictures in two folders, one of them broken."""
  folder = tmp_path / 'in'
  (folder / 'n01').mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name in ('a.png', 'n01/b.JPEG'):
    image = rng.integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(image).save(folder / name, quality=95)
  (folder / 'n01/c.jpg').write_bytes(b'<html>')
  (folder / 'notes.txt').write_text('no picture')
  return folder


def _run(kind, folder, out, *more):
  return main(
    ['controls', f'--kind={kind}', f'--in={folder}', f'--out={out}', *more]
  )


def test_maps_of_a_folder_and_the_names_of_bad_pictures(
  pictures, tmp_path, capsys
):
  out = tmp_path / 'maps/canny'
  assert _run('canny', pictures, out) == 1
  shown = capsys.readouterr()
  assert '3 pictures, 0 of them with a map already' in shown.out
  assert '1 of 3 pictures could not be used, 2 maps are in' in shown.err
  assert 'n01/c.jpg: not an image' in shown.err
  failed = json.loads((out / 'failed.jsonl').read_text())
  assert failed['picture'] == 'n01/c.jpg'
  made = Image.open(out / 'a.png')
  assert made.mode == 'L'
  source = np.asarray(Image.open(pictures / 'a.png'))
  np.testing.assert_array_equal(made, controls.canny(source)[..., 0])
  assert (out / 'n01/b.png').exists()
  # What is there is kept; what is mended is made.
  Image.new('L', (16, 12), 7).save(out / 'a.png')
  (pictures / 'n01/c.jpg').write_bytes((pictures / 'a.png').read_bytes())
  assert _run('canny', pictures, out) == 0
  assert '1 maps in' in capsys.readouterr().out
  assert np.asarray(Image.open(out / 'a.png')).max() == 7
  assert not (out / 'failed.jsonl').exists()


def test_a_network_draws_in_batches(pictures, tmp_path, monkeypatch):
  asked = []

  def fake(kind, weights, side, batch):
    asked.append((kind, weights, side, batch))
    return lambda items: ((n, p[..., 0]) for n, p in items)

  monkeypatch.setattr(annotate, 'make_annotator', fake)
  (pictures / 'n01/c.jpg').unlink()
  words = ('--batch=3', '--resolution=64', '--weights=x.h5')
  assert _run('hed', pictures, tmp_path / 'hed', *words) == 0
  assert asked == [('hed', 'x.h5', 64, 3)]
  assert (tmp_path / 'hed/n01/b.png').exists()


def test_label_maps_become_colours(tmp_path, case, capsys):
  folder = tmp_path / 'labels'
  folder.mkdir()
  Image.fromarray(np.array([[0, 1]], np.uint8)).save(folder / 'a.png')
  (folder / 'p.png').write_bytes(case('c05_seg_palette.png').read_bytes())
  Image.new('RGB', (2, 2)).save(folder / 'rgb.png')
  assert _run('seg', folder, tmp_path / 'seg') == 1
  assert 'rgb.png: mode RGB; accepted: label numbers' in capsys.readouterr().err
  made = np.asarray(Image.open(tmp_path / 'seg/a.png'))
  assert made.tolist() == [[[0, 0, 0], [128, 0, 0]]]
  assert (tmp_path / 'seg/p.png').exists()


def test_maps_of_a_data_set(tmp_path):
  words = [
    'controls', '--kind=canny', '--config=configs/scenes.py:control',
    '--config.data.split=held_out', f'--out={tmp_path}',
  ]  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('scar_jax.data.sources.scenes.Scenes.__len__', lambda _: 3)
    assert main(words) == 0
  names = sorted(p.name for p in tmp_path.rglob('*.png'))
  assert names == ['0.png', '1.png', '2.png']
  assert (tmp_path / 'scenes/held_out').is_dir()


def test_what_cannot_be_made_is_an_error(pictures, tmp_path, capsys):
  def message(*words):
    assert main(['controls', *words]) in (1, 2)
    return capsys.readouterr().err

  out = f'--out={tmp_path}'
  assert '--kind not given. Example: scar controls' in message(out)
  assert 'accepted: one of the two' in message('--kind=canny', out)
  text = message('--kind=canny', out, f'--in={tmp_path}/nothing')
  assert 'no such folder' in text
  (tmp_path / 'empty').mkdir()
  text = message('--kind=canny', out, f'--in={tmp_path}/empty')
  assert 'has no picture; accepted: files that end in .jpg' in text
  (pictures / 'a.jpg').write_bytes((pictures / 'a.png').read_bytes())
  text = message('--kind=canny', out, f'--in={pictures}')
  assert 'of two pictures, such as a.jpg and a.png' in text
