"""`scar bench orders` at a tiny size."""

import json

import pytest

from scar_jax.bench.timing import measure
from scar_jax.cli import main


def test_the_bench_writes_its_rows(tmp_path, capsys):
  out = tmp_path / 'orders.json'
  status = main([
    'bench', 'orders', '--size=tiny', '--grid=4', '--sets=2,16', '--repeats=1',
    '--batch=2', f'--json={out}',
  ])  # fmt: skip
  assert status == 0
  report = json.loads(out.read_text())
  rows = [(row['order'], row['steps']) for row in report['rows']]
  assert rows == [
    ('raster', 16), ('random', 2), ('random', 16), ('scale', 4), ('scale', 2),
  ]  # fmt: skip
  assert report['rows'][0]['speedup_vs_raster'] == 1
  for row in report['rows']:
    assert row['seconds_per_image'] > 0
    ratio = report['rows'][0]['seconds_per_image'] / row['seconds_per_image']
    assert row['speedup_vs_raster'] == pytest.approx(ratio)
  assert report['settings']['grid'] == 4
  assert 'random, 16' in capsys.readouterr().out


def test_the_first_call_is_not_counted_and_the_median_is():
  calls = {'a': 0, 'b': 0}

  def count(name):
    calls[name] += 1
    return calls[name]

  seconds = measure({n: lambda n=n: count(n) for n in calls}, 3)
  assert calls == {'a': 4, 'b': 4}
  assert set(seconds) == {'a', 'b'}


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['order'], "bench 'order' is unknown. Did you mean 'orders'? Known: ord"),
    ([], 'Known: orders, data, manifests, trained, reference. Ex'),
    (['orders', '--size=x'], "model.size='x'; accepted: tiny, small"),
    (['orders', '--grid=2', '--sets=9'], 'num_sets=9 for 4 tokens'),
    (['orders', '--sets=a'], "--sets[0]='a' is not a whole number"),
  ],
)
def test_what_cannot_be_measured_is_an_error(capsys, words, message):
  assert main(['bench', *words]) == 1
  assert message in capsys.readouterr().err
