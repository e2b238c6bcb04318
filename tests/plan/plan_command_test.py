"""`scar plan`: small programs for a TPU that is not here, and its messages."""

import json
import pathlib
import re

import jax
import pytest
from PIL import Image

from scar_jax import cli
from scar_jax.commands.parsing import load_config
from scar_jax.config import check, default_config
from scar_jax.models import unstacked
from scar_jax.plan import compile as compile_lib
from scar_jax.plan import search as search_lib
from scar_jax.plan.chips import read_topology
from scar_jax.plan.networks import abstract_artifacts
from scar_jax.plan.report import lines, verdict
from scar_jax.sharding import make_mesh
from scar_jax.train import inputs
from scar_jax.train.tasks import make_task

_CONFIG = """
from configs import common

def get_config(arg=None):
  return common.task_config(
    'scar',
    data=dict(batch=8, image_size=16),
    model=dict(size='tiny', width=64, layers=2, heads=2, dtype='bfloat16'),
    text=dict(kind='label', classes=10),
    prefix=dict(k=2),
    tokenizer=dict(size='tiny,codes=64'),
    encoder=dict(size='tiny,image_size=16,width=32,depth=1'),
    sample=dict(guidance=2.0),
  )
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('plan') / 'small.py'
  root = str(pathlib.Path(__file__).parents[2])
  path.write_text(f'import sys\nsys.path.insert(0, {root!r})\n{_CONFIG}')
  return str(path)


def _plan(config, *words):
  return cli.main([
    'plan', f'--config={config}', '--topology=v5e:2x2', *words,
  ])  # fmt: skip


@pytest.mark.parametrize('what', ['train', 'sample'])
def test_small_programs_compile_for_a_tpu(
  config, tmp_path, what, capsys, monkeypatch
):
  pytest.importorskip(
    'libtpu', reason='the TPU compiler comes with scar_jax[plan]'
  )
  out, picture = tmp_path / 'plan.json', tmp_path / 'plan.png'
  # A model that samplers on CPUs keep with its kernels turned.
  monkeypatch.setattr(unstacked, '_LARGE', 0)
  more = ['--sample'] if what == 'sample' else ['--mesh=fsdp:2,tensor:2']
  status = _plan(config, f'--json={out}', f'--picture={picture}', *more)
  shown = capsys.readouterr()
  assert status == 0, shown.err
  report = json.loads(out.read_text())
  assert report['fits']
  assert report['hbm_bytes'] < report['hbm_limit_bytes'] == 15.75 * 2**30
  assert sum(report['memory'].values()) == pytest.approx(report['hbm_bytes'])
  assert report['params'] > 1e5
  assert report['unknown_loops'] == 0
  assert report['step_seconds_roofline'] > 0
  assert 0 < report['mfu_bound'] < 1
  assert 'fits: 0.' in shown.out
  assert Image.open(picture).size[0] > 800
  compiled = report['flops_per_chip'] * report['chips']
  assert compiled == pytest.approx(
    report['flops_ratio'] * report['flops_analytic']
  )
  if what == 'train':
    # Some work is done by both chips of the tensor axis.
    assert 0.9 < report['flops_ratio'] < 2
    kinds = {(c['kind'], c['axes']) for c in report['collectives']}
    assert ('all-gather', 'fsdp') in kinds
    assert any(axes == 'tensor' for _, axes in kinds)


@pytest.mark.parametrize('option', ['xla_none=1', 'xla_tpu_rwb_fusion=word'])
def test_options_of_the_compiler_are_judged_by_it(config, option, capsys):
  pytest.importorskip(
    'libtpu', reason='the TPU compiler comes with scar_jax[plan]'
  )
  assert _plan(config, '--quick', f'--config.train.tpu_options={option}') == 1
  name, _ = option.split('=')
  assert re.search(f"tpu_options=.*'{name}'", capsys.readouterr().err)


def test_the_batch_is_that_of_the_loader():
  raw = load_config('configs/scenes.py:edit,smoke', {
    'tokenizer.size': 'tiny', 'encoder.size': 'tiny', 'mesh.fsdp': '2',
  })  # fmt: skip
  config = check(raw)
  mesh = make_mesh(vars(config.mesh))
  task = make_task(config, abstract_artifacts(config))
  found = compile_lib.abstract_batch(config, task, mesh)
  loader = inputs.make_loader(config, mesh)
  assert found == inputs.first_batch(loader, mesh)
  loader.close()


def test_cached_tokens_leave_the_tokenizer_out_of_the_step():
  raw = load_config('configs/scenes.py:edit,smoke', {
    'tokenizer.size': 'tiny', 'encoder.size': 'tiny',
  })  # fmt: skip
  config = check(raw)
  mesh = make_mesh(vars(config.mesh))
  task = make_task(config, abstract_artifacts(config))
  batch = compile_lib.abstract_batch(config, task, mesh, cached_tokens=True)
  assert batch['tokens'].shape == (config.data.batch, 64)
  assert {'target', 'condition'} <= set(batch)  # the encoder sees both

  def encodes(batch):
    params = jax.eval_shape(task.init, jax.random.key(0), batch)['params']
    step = jax.make_jaxpr(
      lambda p, f, b: task.loss(p, {}, f, b, jax.random.key(0), True)
    )
    return 'argmin' in str(step(params, dict(task.frozen), batch))

  assert encodes({k: v for k, v in batch.items() if k != 'tokens'})
  assert not encodes(batch)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--mesh=fdsp:2'], "mesh='fdsp:2'; accepted: AXIS:SIZE of replica, data"),
    (['--topology=v5e:4'], 'has 1 axes; accepted: 2'),
    (['--search', '--sample'], '--search with --sample; accepted: one of'),
    (['--cached_tokens', '--sample'], '--cached_tokens with --sample'),
    (['--topology='], 'scar plan needs --topology'),
  ],
)
def test_what_cannot_be_planned_is_an_error(config, words, message, capsys):
  assert _plan(config, *words) == 1
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  ('text', 'needed'),
  [
    (
      'XLA:TPU compile permanent error. Ran out of memory in memory space '
      'hbm. Used 21.30G of 15.75G hbm. Exceeded hbm capacity by 5.55G.',
      21.3,
    ),
    (
      'Ran out of memory on HBM, the total memory required for HLO '
      'temporaries (768.00G) exceeds available HBM (30.75G).',
      768,
    ),
  ],
)
def test_too_little_memory_is_an_answer(text, needed):
  found = compile_lib.read_shortage(f'RESOURCE_EXHAUSTED: {text}')
  assert found == pytest.approx(needed * 2**30)
  assert compile_lib.read_shortage('INTERNAL: something else') is None


def test_a_plan_that_does_not_fit_says_by_how_much():
  gib = 2**30
  report = dict(
    program='train', topology='v5e:4x4', chips=16, mesh={'fsdp': 16}, batch=64,
    accum=1, remat='none', params=8e8, fits=False, hbm_bytes=21.3 * gib,
    hbm_limit_bytes=15.75 * gib, memory={'parameters': 1.3 * gib},
    flops_parts={'layers': 3e12, 'head': 1e12}, flops_analytic=4e12,
    compile_seconds=3.0,
  )  # fmt: skip
  said = 'does not fit: needs 21.30 GiB of 15.75 GiB HBM per chip'
  assert verdict(report) == said
  text = '\n'.join(lines(report))
  assert said in text
  assert 'layers 75%, head 25%' in text


def _search(monkeypatch, fits, tries=99, batch=64):
  """A search in which `fits(report)` stands for the compiler."""
  raw = default_config('scar')
  raw.data.batch, raw.model.heads = batch, 4
  topology = read_topology('v5e:4x4')
  monkeypatch.setattr(search_lib, 'set_up', lambda config, *_: config)
  monkeypatch.setattr(search_lib, 'compile_train', lambda config: None)

  def report(config, program, topology, what):
    made = dict(
      mesh=vars(config.mesh), accum=config.train.accum,
      remat=config.model.remat,
    )  # fmt: skip
    speed = 100 / config.mesh.tensor - config.train.accum
    speed -= len(config.model.remat) / 10
    return made | dict(fits=fits(made), images_per_second=speed)

  monkeypatch.setattr(search_lib, 'make_report', report)
  return search_lib.search(check(raw), topology, tries)


def test_a_search_takes_the_lightest_policy_that_fits(monkeypatch):
  found = _search(monkeypatch, lambda r: r['remat'] != 'none')
  best = found[0]
  assert best['fits']
  assert (best['mesh']['tensor'], best['accum'], best['remat']) == (
    1,
    1,
    'dots',
  )
  assert [r['fits'] for r in found] == sorted(
    (r['fits'] for r in found), reverse=True
  )
  seen = {(r['mesh']['fsdp'], r['mesh']['tensor']) for r in found}
  assert {(16, 1), (4, 1), (8, 2), (4, 4)} <= seen
  assert (2, 8) not in seen  # 8 does not divide 4 heads


def test_a_search_ends_with_its_tries_and_skips_what_does_not_divide(
  monkeypatch,
):
  assert len(_search(monkeypatch, lambda r: False, tries=5)) == 5
  found = _search(monkeypatch, lambda r: True, batch=8)
  assert {r['mesh']['tensor'] for r in found} == {2, 4}


def test_a_mesh_is_done_once_nothing_need_be_computed_again(monkeypatch):
  found = _search(monkeypatch, lambda r: True)
  assert {(r['accum'], r['remat']) for r in found} == {(1, 'none')}
