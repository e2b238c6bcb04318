"""`scar data`: statistics, the page of pictures, seeds.json."""

import json
import shutil

import numpy as np
import pytest
import source_files as files
from PIL import Image

from scar_jax import cli
from scar_jax.commands import data as data_command
from scar_jax.commands.parsing import load_config
from scar_jax.config import check
from scar_jax.data.sources import make_source
from scar_jax.data.survey import spread, survey
from scar_jax.data.text import ByteText, make_text
from scar_jax.eval import report
from scar_jax.train.inputs import make_loader


@pytest.fixture
def section(tmp_path):
  some = files.rows(10)
  some[3]['target'] = some[4]['target'] = b'no picture'
  some[5]['condition'] = files.picture('green', 16)
  some[6]['text'] = None
  some[7]['text'] = 'long enough to be cut'
  return files.write('jsonl', tmp_path, some)


def test_measures(section):
  found = survey(make_source(section), ByteText(12))
  assert (found.records, found.seen, found.unreadable) == (10, 10, 0.2)
  table = found.table()
  assert table['target width'] == {'min': 8, 'median': 8, 'mean': 8, 'max': 8}
  assert table['condition height']['max'] == 16
  assert table['text tokens']['max'] == 12
  assert table['text characters']['max'] == 21
  assert (found.cut, found.texts) == (1, 7)
  assert found.labels == {0: 4, 1: 4}
  summary = json.loads(json.dumps(found.summary()))
  assert summary['empty_text'] == pytest.approx(1 / 8)
  assert len(summary['bad']) == 2
  assert list(summary['reasons'].values()) == [2]
  some = survey(make_source(section), None, spread(10, 3))
  assert some.seen == 3


def test_places_are_spread_over_all():
  assert spread(10, 0) == spread(10, 20) == list(range(10))
  assert spread(10, 3) == [0, 3, 6]


CONFIG = """
from configs.common import smoke, task_config
def get_config(arg):
  return smoke(task_config('scar'))
"""


def test_inspect_prints_and_writes_a_page(section, tmp_path, capsys):
  (tmp_path / 'c.py').write_text(CONFIG)
  status = cli.main(
    [
      *('data', 'inspect', f'--config={tmp_path}/c.py', '--rows=9'),
      *('--config.data.source=jsonl', f'--config.data.path={section.path}'),
      *('--config.data.batch=4', '--config.data.strict=true'),
      *('--config.data.image_size=8', '--batches=2'),
      *(f'--page={tmp_path}/page.png', f'--json={tmp_path}/data.json'),
    ]
  )
  text = capsys.readouterr().out
  assert status == 0
  assert 'unreadable: 2 of 10 (20.00 %)' in text
  assert 'train.jsonl:4: ' in text
  assert 'records/s with data.workers=0' in text
  summary = json.loads((tmp_path / 'data.json').read_text())
  assert summary['images_per_second'] > 0
  page = np.asarray(Image.open(tmp_path / 'page.png'))
  assert page.shape[0] > 400
  assert len(np.unique(page.reshape(-1, 3), axis=0)) > 20


def test_the_page_has_the_words_that_belong_to_its_pictures(monkeypatch):
  # With augmentation the embedded source draws another record for each place.
  seen = {}
  monkeypatch.setattr(
    report, 'write_grid', lambda path, columns, **_: seen.update(columns)
  )
  config = check(load_config('configs/openmoji.py:edit', {'data.batch': '4'}))
  loader = make_loader(config)
  data_command._page('', loader.plan, 6)
  text = make_text(config.text)
  for k, row in ((0, 0), (0, 3), (1, 1)):
    batch, _ = loader.plan.load(0, k)
    ids, _ = text.encode(seen['text'][4 * k + row], '')
    np.testing.assert_array_equal(ids, batch['text'][row])
  assert len(seen['target']) == len(seen['condition']) == 6
  loader.close()


@pytest.mark.parametrize(
  ('words', 'reason'),
  [
    (['data', 'inspct'], "'inspct' is unknown. Did you mean 'inspect'"),
    (['data', 'inspect'], 'needs --config'),
    (['data', 'seeds', '--path=no/where'], "'no/where' is no folder"),
  ],
)
def test_what_cannot_be_done(words, reason, capsys):
  assert cli.main(words) == 1
  assert reason in capsys.readouterr().err


def test_seeds_are_written_once(case, tmp_path, capsys):
  root = tmp_path / 'c17'
  shutil.copytree(case('c17/seeds.json').parent, root)
  (root / 'seeds.json').chmod(0o600)
  (root / 'seeds.json').unlink()
  assert cli.main(['data', 'seeds', f'--path={root}']) == 0
  found = json.loads((root / 'seeds.json').read_text())
  assert found == [['0000000', ['100']], ['0000001', ['101']]]
  assert cli.main(['data', 'seeds', f'--path={root}']) == 1
  assert 'is there already' in capsys.readouterr().err
