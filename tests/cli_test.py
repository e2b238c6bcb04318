"""The `scar` command line: what it reads, and how it says no."""

import json
import subprocess
import sys

import pytest

from scar_jax.cli import COMMANDS, main
from scar_jax.commands import parsing, sample, train

_CHECK = ['train', '--config=configs/openmoji.py:edit', '--check']


def _run(capsys, *words):
  status = main(list(words))
  shown = capsys.readouterr()
  return status, shown.out, shown.err


def test_help_lists_commands_and_options(capsys):
  status, out, _ = _run(capsys, '--help')
  assert status == 0
  assert all(name in out for name in COMMANDS)
  for name in COMMANDS:
    status, out, _ = _run(capsys, name, '--help')
    assert status == 0
    assert f'scar {name}' in out


def test_help_needs_no_jax():
  code = 'import sys; from scar_jax.cli import main; main(["--help"]);'
  code += 'sys.exit("jax" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', code], check=False, capture_output=True
  )
  assert done.returncode == 0, done.stderr


def test_unknown_command_names_the_nearest(capsys):
  status, _, err = _run(capsys, 'trian')
  assert status == 2
  assert "Did you mean 'train'?" in err


@pytest.mark.parametrize(
  'words', [['--resume', 'False'], ['--resume=0'], ['--noresume']]
)
def test_false_is_false_however_it_is_written(words):
  args = parsing.parse('train', words, train.define, True)
  assert args.flags.resume is False


def test_flags_of_case_c24(case, capsys):
  for row in json.loads(case('c24_flags.json').read_text())['cases']:
    if row['expect'] == 'resume is false':
      args = parsing.parse('train', row['args'], train.define, True)
      assert args.flags.resume is False
      continue
    status, out, err = _run(capsys, *_CHECK, *row['args'])
    assert (status, out) == (2, ''), row
    name = row['args'][0].lstrip('-').replace('-', '_')
    assert f'no option --{name}.' in err
    if name == 'lerning_rate':
      assert 'Did you mean --config.optim.lr?' in err


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--config.optim.lr=1e-4x'], "optim.lr='1e-4x' is not a number"),
    (['--config.data.batch', '-3'], 'below the least accepted, 1'),
    (['--config.model.dtype=bf61'], 'accepted: float32, bfloat16'),
    (['--config.lerning_rate=1'], "no field 'lerning_rate'"),
    (['--config.optim.lerning-rate=1'], "no field 'optim.lerning_rate'"),
    (['--config.data.batch.x=1'], 'batch is a value, not a section'),
  ],
)
def test_wrong_config_values_are_told_in_one_line(capsys, words, message):
  status, out, err = _run(capsys, *_CHECK, *words)
  assert (status, out) == (1, '')
  assert message in err
  assert err.count('\n') == 1


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--top-k', '1.5'], 'top_k'),
    (['--seed'], '--seed needs a value'),
    (['out.png'], "stray word 'out.png'"),
  ],
)
def test_wrong_flags_are_errors(words, message):
  with pytest.raises(ValueError, match=message):
    parsing.parse('sample', words, sample.define)


def test_a_config_is_checked_and_printed_with_its_overrides(capsys):
  status, out, _ = _run(
    capsys, *_CHECK, '--config.optim.lr', '3e-4', '--config.data.batch=8'
  )
  assert status == 0
  config = json.loads(out)
  assert (config['optim']['lr'], config['data']['batch']) == (3e-4, 8)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['train'], 'needs --config'),
    (['train', '--config=configs/openmoji.py'], 'needs --workdir'),
    (['train', '--config=configs/opnmoji.py', '--check'], "'openmoji.py'?"),
    (['eval', '--workdir=nowhere'], 'nowhere'),
    (['edit', '--workdir=nowhere', '--image=a', '--out=b.png'], 'missing file'),
  ],
)
def test_what_is_missing_is_named(capsys, words, message):
  status, _, err = _run(capsys, *words)
  assert status == 1
  assert message in err


def test_indivisible_image_size_is_told_before_anything_is_made(
  capsys, tmp_path
):
  status, _, err = _run(
    capsys,
    'train',
    '--config=configs/scenes.py:tokenizer,smoke',
    f'--workdir={tmp_path}/run',
    '--config.data.image_size=250',
  )
  assert status == 1
  assert 'data.image_size=250' in err
  assert '248 or 252' in err
