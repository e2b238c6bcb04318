"""`scar eval`: suites, what they leave, and going on where it stopped."""

import json

import numpy as np
import pytest
from PIL import Image
from scar_setup import SIZE, finished_runs, scar_config

from scar_jax.cli import main
from scar_jax.commands import sampling_flags
from scar_jax.commands.eval import read_share
from scar_jax.config import to_dict
from scar_jax.editor import Editor


def _picture(seed, size):
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (8, 8, 3), np.uint8)
  return Image.fromarray(small).resize((size, size), Image.Resampling.NEAREST)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run on four pairs of pictures of its own."""
  home = tmp_path_factory.mktemp('eval')
  lines = []
  for i in range(4):
    for name in ('source', 'target'):
      _picture(10 * i + len(name), SIZE).save(home / f'{name}{i}.png')
    line = {'source': f'source{i}.png', 'target': f'target{i}.png'}
    lines.append(json.dumps({**line, 'instruction': f'make it {i}'}))
  (home / 'pairs.jsonl').write_text('\n'.join(lines))
  runs = finished_runs(home / 'runs')
  config = scar_config(
    data__source='jsonl', data__path=str(home / 'pairs.jsonl')
  )
  text = json.dumps({'config': to_dict(config)})
  (runs / 'scar_run/config.json').write_text(text)
  return runs / 'scar_run'


@pytest.fixture(scope='module')
def editor(run):
  return Editor.load(run)


@pytest.fixture(autouse=True)
def _loaded_once(editor, monkeypatch):
  monkeypatch.setattr(sampling_flags, 'load_editor', lambda _: editor)


@pytest.fixture(scope='module')
def pie(tmp_path_factory):
  """Two items of PIE-Bench, one of them with all pixels to edit."""
  folder = tmp_path_factory.mktemp('pie')
  (folder / 'annotation_images').mkdir()
  items = {}
  for i, runs in enumerate(([100_000, 60_000], [0, 512 * 512])):
    _picture(i, 512).save(folder / f'annotation_images/{i}.png')
    items[str(i)] = {
      'image_path': f'{i}.png',
      'original_prompt': 'a cat',
      'editing_prompt': 'a [dog]',
      'editing_instruction': 'make it a dog',
      'editing_type_id': str(i),
      'mask': runs,
    }
  (folder / 'mapping_file.json').write_text(json.dumps(items))
  return folder


def _eval(capsys, *words):
  status = main(['eval', *(f'--{word}' for word in words)])
  shown = capsys.readouterr()
  return status, shown.out, shown.err


def _count_calls(monkeypatch):
  calls, call = [], Editor.__call__

  def counted(self, images, *args, **kw):
    calls.append(len(images))
    return call(self, images, *args, **kw)

  monkeypatch.setattr(Editor, '__call__', counted)
  return calls


def test_pie_bench_beside_the_paper(run, pie, tmp_path, capsys, monkeypatch):
  words = (
    f'workdir={run}', 'suite=pie', f'config.data.path={pie}',
    f'out={tmp_path}/pie',
  )  # fmt: skip
  calls = _count_calls(monkeypatch)
  status, _, err = _eval(capsys, *words)
  assert status == 0, err
  assert calls == [2]
  scores = json.loads((tmp_path / 'pie/scores.json').read_text())
  found = scores['splits']['all']
  assert found['n'] == 2
  # The item without a background has no numbers of it.
  assert found['types']['1']['psnr'] is None
  assert found['psnr'] == found['types']['0']['psnr'] > 0
  table = (tmp_path / 'pie/table.md').read_text()
  assert '| SCAR, LlamaGen-XL (paper) | 30.98 | 22.59 |' in table
  assert f'| **{run}** | – | {found["psnr"]:.2f} |' in table
  assert 'its weights were not given: structure, lpips, clip_whole' in table
  page = (tmp_path / 'pie/report.html').read_text()
  assert page.count('src="data:image/png;base64,') == 6  # no truth to show
  assert 'http' not in page
  assert 'make it a dog' in page

  made = tmp_path / 'pie/all/000001.png'
  before = made.read_bytes()
  made.unlink()
  assert _eval(capsys, *words)[0] == 0
  assert calls == [2, 1]
  assert made.read_bytes() == before
  status, _, err = _eval(capsys, *words, 'seed=5')
  assert status == 1
  assert 'pictures' in err or 'images of other settings: seed: 0 -> 5' in err


def test_controls_are_made_in_shares(run, tmp_path, capsys, monkeypatch):
  words = (
    f'workdir={run}', 'suite=controls', 'control=canny', 'splits=train',
    f'out={tmp_path}', f'json={tmp_path}/all.json',
  )  # fmt: skip
  calls = _count_calls(monkeypatch)
  status, out, err = _eval(capsys, *words, 'share=1/2')
  assert status == 0, err
  assert '2 pictures of share 1/2' in out
  names = sorted(p.name for p in (tmp_path / 'train').iterdir())
  assert names == ['000001.png', '000003.png']
  assert not (tmp_path / 'scores.json').exists()
  assert _eval(capsys, *words)[0] == 0
  assert calls == [2, 2]
  found = json.loads((tmp_path / 'all.json').read_text())['splits']['train']
  assert found['n'] == 4
  assert 0 <= found['f1'] <= 100
  page = (tmp_path / 'report.html').read_text()
  assert page.count('src="data:image/png;base64,') == 16


def test_segments_from_two_folders(tmp_path, capsys):
  for name, value in (('labels', 1), ('predicted', 2)):
    (tmp_path / name).mkdir()
    labels = np.full((4, 4), 1, np.uint8)
    labels[:2] = value
    Image.fromarray(labels).save(tmp_path / name / 'a.png')
  words = [
    'suite=controls', f'labels={tmp_path}/labels', f'json={tmp_path}/s.json',
    f'predicted={tmp_path}/predicted', 'classes=3',
  ]  # fmt: skip
  assert _eval(capsys, *words)[0] == 0
  found = json.loads((tmp_path / 's.json').read_text())['splits']['segments']
  # Half of class 1 was found; class 2 was found and not there.
  assert found['classes'] == {'1': 50.0, '2': 0.0}
  assert found['miou'] == 25.0
  (tmp_path / 'predicted/b.png').write_bytes(b'')
  status, _, err = _eval(capsys, *words)
  assert status == 1
  assert "without a partner ['b.png']; accepted" in err


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ([], "data.source='jsonl' has no suite of its own; accepted: --suite=pie"),
    (['suite=scenes'], "--suite=scenes with data.source='jsonl'"),
    (['suite=controls'], '(set --splits)'),
    (['suite=controls', 'splits=train'], "--control='edit'; accepted: canny"),
    (['suite=fid', 'splits=train'], "--inception='': no such file"),
    (['suite=pie', 'clip=a'], 'accepted: both, or neither'),
    (['suite=pie', 'share=0/2'], '--share without --out'),
  ],
)
def test_what_is_missing_is_named(run, capsys, words, message):
  status, _, err = _eval(capsys, f'workdir={run}', *words)
  assert status == 1
  assert message in err


@pytest.mark.parametrize('text', ['2/2', '1', 'a/3', '-1/2'])
def test_shares_are_checked(text):
  with pytest.raises(ValueError, match='accepted: K/N with K from 0'):
    read_share(text)
