"""`scar bench trained`: scores that are on disk, and times."""

import json

import numpy as np
from PIL import Image
from scar_setup import frozen_artifacts, scar_config

from scar_jax.bench import trained
from scar_jax.bench.timing import Report
from scar_jax.cli import main
from scar_jax.config import default_config
from scar_jax.data.records import Record
from scar_jax.train.tasks import make_task


class Stub:
  """An editor and a source at once."""

  def __init__(self, order):
    config = scar_config(order__name=order)
    self.cfg = make_task(config, frozen_artifacts(order)).editor

  def __call__(self, pictures, prompts):
    assert len(pictures) == len(prompts) == 3
    return [Image.fromarray(p) for p in pictures]

  def load(self, i, rng):
    return Record(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))


def test_orders_are_compared(tmp_path, monkeypatch, capsys):
  for order in ('raster', 'scale'):
    home = tmp_path / order
    (home / 'edit').mkdir(parents=True)
    (home / 'eval_edit').mkdir()
    config = default_config('scar')
    config.order.name = order
    text = json.dumps({'config': config.to_dict()})
    (home / 'edit/config.json').write_text(text)
    scores = {'tone_accuracy': 0.875, 'background_psnr': 21.5}
    text = json.dumps({'splits': {'new_edit': scores}})
    (home / 'eval_edit/scores.json').write_text(text)
  monkeypatch.setattr(
    trained.Editor, 'load', lambda path: Stub(path.parent.name)
  )
  monkeypatch.setattr(trained, 'make_source', lambda *_: Stub('raster'))
  both = f'--workdirs={tmp_path}/raster,{tmp_path}/scale'
  out = tmp_path / 'out.json'
  assert main(['bench', 'trained', both, '--repeats=1', f'--json={out}']) == 0
  rows = json.loads(out.read_text())['rows']
  assert [row['order'] for row in rows] == ['raster', 'scale']
  assert [row['steps'] for row in rows] == [4, 2]
  assert rows[0]['edit_accuracy'] == 0.875
  assert rows[0]['seconds_per_image'] > 0
  assert 'scale' in capsys.readouterr().out


def test_rows_of_one_label_are_all_shown():
  rows = [{'order': 'scale', 'steps': n} for n in (2, 3, 4)]
  table = Report({}, rows, lambda row: row['order']).table()
  assert [row['steps'] for row in table.values()] == [2, 3, 4]
  assert list(table) == ['scale', 'scale (2)', 'scale (3)']


def test_what_is_no_finished_quickstart_is_named(tmp_path, capsys):
  assert main(['bench', 'trained']) == 1
  assert '--workdirs not given; accepted: dir' in capsys.readouterr().err
  assert main(['bench', 'trained', f'--workdirs={tmp_path}']) == 1
  assert 'edit/config.json' in capsys.readouterr().err
