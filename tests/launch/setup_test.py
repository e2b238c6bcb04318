"""launch/setup.sh: what is installed, and when again."""

import pathlib
import subprocess

SETUP = pathlib.Path('launch/setup.sh').resolve()


def _environment(root):
  """A virtual environment whose python writes down how it is called."""
  (root / 'bin').mkdir(parents=True)
  python = root / 'bin/python'
  python.write_text(f'#!/bin/sh\necho "$(pwd)" "$@" >>{root}/calls\n')
  python.chmod(0o755)
  (root / 'bin/activate').write_text(f'PATH={root}/bin:$PATH\n')


def _set_up(checkout, environment, extra):
  checkout.mkdir(exist_ok=True)
  (checkout / 'setup.py').touch()
  subprocess.run(
    ['bash', '-c', f'. {SETUP}; set_up {extra}'],
    cwd=checkout,
    env={'VENV': str(environment), 'PATH': '/usr/bin:/bin'},
    check=True,
  )
  calls = environment / 'calls'
  return len(calls.read_text().splitlines())


def test_an_environment_that_another_checkout_took_is_taken_back(tmp_path):
  environment, a, b = (tmp_path / name for name in ('venv', 'a', 'b'))
  _environment(environment)
  assert _set_up(a, environment, 'test') == 1
  assert _set_up(a, environment, 'test') == 1  # as it was
  assert _set_up(a, environment, 'data') == 2
  assert _set_up(a, environment, 'test') == 2
  assert _set_up(b, environment, 'data') == 3
  assert _set_up(a, environment, 'test') == 4
  calls = (environment / 'calls').read_text().splitlines()
  assert calls[-1].split()[0] == str(a)
  assert calls[-1].endswith('-e .[test]')
