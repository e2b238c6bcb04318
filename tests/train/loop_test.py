"""The training program on the toy task: resume, stops, what it writes."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from toy import ToyConfig, ToyLoader, ToyTask
from toy_run import toy_config, toy_train

from scar_jax.artifacts import load_artifact
from scar_jax.train import loop
from scar_jax.train import step as step_lib
from scar_jax.train.checkpoints import CheckpointError


def _lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def _losses(workdir):
  return [(line['step'], line['loss']) for line in _lines(workdir)]


def _params(workdir):
  params = load_artifact(workdir, 'toy').params
  return {k: np.asarray(v) for k, v in params['up'].items()}


def test_two_plus_two_steps_equal_four_bit_for_bit(tmp_path):
  whole = toy_train(tmp_path / 'whole')
  toy_train(tmp_path / 'parts', steps=2)
  toy_train(tmp_path / 'parts', steps=4)
  assert _losses(tmp_path / 'whole') == _losses(tmp_path / 'parts')
  a, b = _params(tmp_path / 'whole'), _params(tmp_path / 'parts')
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
  assert whole['compilations'] == 1
  assert whole['steps'] == 4


def test_a_run_leaves_its_config_summary_pictures_and_artifact(tmp_path):
  summary = toy_train(tmp_path, picture_every=2)
  stored = json.loads((tmp_path / 'summary.json').read_text())
  assert stored == summary
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['config']['optim']['lr'] == 0.01
  assert 'jax' in config['versions']
  assert sorted(p.name for p in (tmp_path / 'pictures').iterdir()) == [
    '00000002.png',
    '00000004.png',
  ]
  artifact = load_artifact(tmp_path)
  assert artifact.kind == 'toy'
  assert artifact.config == ToyConfig()
  assert artifact.fingerprint == summary['artifact']
  assert artifact.meta['steps'] == 4
  line = _lines(tmp_path)[-1]
  assert {'loss', 'grad_norm', 'lr', 'skipped', 'images_per_second'} <= {*line}


def test_a_finished_run_is_not_trained_again(tmp_path):
  first = toy_train(tmp_path)
  again = toy_train(tmp_path)
  assert len(_lines(tmp_path)) == 4
  assert again['artifact'] == first['artifact']


def test_one_bad_batch_is_skipped_and_counted(tmp_path):
  summary = toy_train(tmp_path, bad={10})
  assert summary['skipped_steps'] == 1
  lines = _lines(tmp_path)
  assert [line['skipped'] for line in lines] == [0, 1, 1, 1]
  assert lines[1]['loss'] is None
  assert np.isfinite(lines[3]['loss'])


def test_three_bad_steps_in_a_row_stop_the_run_with_records(tmp_path):
  bad = {17, 25, 33}
  message = (
    r'3 steps in a row, 3 to 5, had a loss or gradient that is not finite.*'
    r'step 3: \[16, 17, .*step 5: \[32, 33, .*last good checkpoint'
  )
  with pytest.raises(loop.TrainingError, match=message):
    toy_train(tmp_path, bad=bad, steps=9)
  assert (tmp_path / 'checkpoints' / '4').is_dir()
  assert not (tmp_path / 'artifact').exists()


def test_sigterm_saves_and_the_next_start_goes_on(tmp_path, monkeypatch):
  place = loop.inputs.place_batch

  def signalled(local, mesh):
    if local['index'][0] == 8:
      os.kill(os.getpid(), signal.SIGTERM)
    return place(local, mesh)

  monkeypatch.setattr(loop.inputs, 'place_batch', signalled)
  before = signal.getsignal(signal.SIGTERM)
  summary = toy_train(tmp_path / 'cut', save_every=100)
  assert (summary['stopped'], summary['steps']) == ('SIGTERM', 2)
  assert signal.getsignal(signal.SIGTERM) is before
  assert not (tmp_path / 'cut' / 'artifact').exists()
  monkeypatch.undo()
  toy_train(tmp_path / 'cut', save_every=100)
  toy_train(tmp_path / 'whole')
  assert _losses(tmp_path / 'cut') == _losses(tmp_path / 'whole')


def test_another_config_in_the_work_directory_is_refused(tmp_path):
  toy_train(tmp_path, steps=2)
  before = (tmp_path / 'config.json').read_text()
  with pytest.raises(
    CheckpointError, match=r'another config: data.batch: 8 -> 16; train.ema'
  ):
    toy_train(tmp_path, batch=16, ema=0.5)
  assert (tmp_path / 'config.json').read_text() == before


def test_a_run_goes_on_with_other_compiler_options(tmp_path, monkeypatch):
  toy_train(tmp_path, steps=2)
  options = (('xla_none', 'true'),)
  toy_train(tmp_path, steps=4, tpu_options=options)  # not on TPUs
  assert [step for step, _ in _losses(tmp_path)] == [1, 2, 3, 4]
  monkeypatch.setattr(step_lib, 'platform', lambda: 'tpu')
  with pytest.raises(ValueError, match=r"tpu_options=.*'xla_none'"):
    toy_train(tmp_path, steps=6, tpu_options=options)


def test_a_fresh_start_is_never_silent(tmp_path):
  with pytest.raises(CheckpointError, match=r'no whole checkpoint in .* empty'):
    toy_train(tmp_path / 'none', require_resume=True)
  toy_train(tmp_path / 'run', steps=2)
  with pytest.raises(CheckpointError, match=r'resume=False, but .* step 2'):
    toy_train(tmp_path / 'run', resume=False)


def test_init_from_starts_with_its_parameters(tmp_path):
  toy_train(tmp_path / 'a')
  toy_train(tmp_path / 'b', init_from=tmp_path / 'a', steps=1, lr=0.0, ema=0.0)
  a, b = _params(tmp_path / 'a'), _params(tmp_path / 'b')
  np.testing.assert_array_equal(a['kernel'], b['kernel'])


def test_init_from_of_another_shape_lists_paths(tmp_path):
  toy_train(tmp_path / 'a', steps=1)
  task = ToyTask(ToyConfig(width=8))
  config = dataclasses.replace(toy_config(), init_from=str(tmp_path / 'a'))
  with pytest.raises(
    ValueError, match=r'up/kernel: expected \(48, 8\), got \(48, 16\)'
  ):
    loop.train(config, tmp_path / 'b', task, ToyLoader())


def test_batch_that_does_not_divide_fails_before_anything(tmp_path):
  with pytest.raises(ValueError, match=r'data.batch=10 is not .* 8 devices'):
    toy_train(tmp_path / 'x', batch=10)
  assert not (tmp_path / 'x').exists()
