"""The `scar` command: finds the subcommand, parses its words, runs it.

In: `sys.argv`. Out: an exit status: 0, 1 after an error that is told in one
line, 2 for a command line that cannot be read. Handlers are imported only when
asked for, so that `scar --help` is instant.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from scar_jax.config_values import nearest

# Name -> what it is for; the module is scar_jax/commands/<name>.py.
COMMANDS = {
  'train': 'train a tokenizer, an encoder or SCAR from a config file',
  'edit': 'edit or colour one image with a trained model',
  'sample': 'make images for a JSONL file of requests',
  'eval': 'score a trained model on held-out data',
  'sweep': 'train and score many variants of a recipe, and compare them',
  'inspect': 'draw what a trained model looks at and is unsure of',
  'demo': 'serve a page to try a trained model on',
  'data': 'look at a data set: counts, sizes, bad records, pictures',
  'plan': 'compile for a TPU topology: memory, FLOPs, time at best',
  'bench': 'measure speed on this machine',
  'convert': 'turn a public checkpoint into an artifact, or back',
  'tokenize': 'store tokens and features of a data set for training',
  'controls': 'make control maps of the pictures of a folder or a data set',
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line; returns the exit status."""
  words = list(sys.argv[1:] if argv is None else argv)
  if not words or words[0] in ('-h', '--help', 'help'):
    _write(_usage())
    return 0 if words else 2
  if words[0] in ('--version', 'version'):
    from importlib.metadata import version

    _write(f'scar_jax {version("scar_jax")}')
    return 0
  name, *rest = words
  if name not in COMMANDS:
    return _fail(
      f'scar has no command {name!r}.{nearest(name, COMMANDS)} '
      f'Known: {", ".join(COMMANDS)}',
      2,
    )
  return _run(name, rest)


def _run(name: str, words: list[str]) -> int:
  from scar_jax.commands import console, parsing

  module: Any = importlib.import_module(f'scar_jax.commands.{name}')
  if any(word in ('-h', '--help') for word in words):
    _write(_help(name, module))
    return 0
  first = getattr(module, 'POSITIONAL', None)
  if first and words and not words[0].startswith('-'):
    words = [f'--{first}={words[0]}', *words[1:]]
  try:
    args = parsing.parse(name, words, module.define, module.WITH_CONFIG)
  except ValueError as error:
    return _fail(str(error), 2)
  console.set_up_logging()
  try:
    console.say(module.run(args))
  except (ValueError, OSError) as error:
    return _fail(f'scar {name}: {error}', 1)
  except RuntimeError as error:
    # Ours are told in one line; those of libraries keep their traceback.
    if not type(error).__module__.startswith('scar_jax'):
      raise
    return _fail(f'scar {name}: {error}', 1)
  except KeyboardInterrupt:
    return _fail(f'scar {name}: interrupted', 130)
  return 0


def _usage() -> str:
  lines = [f'  {name:<8} {about}' for name, about in COMMANDS.items()]
  return '\n'.join(
    [
      'usage: scar <command> [--option=value ...]',
      '',
      *lines,
      '',
      'scar <command> --help lists the options of a command.',
    ]
  )


def _help(name: str, module: Any) -> str:
  values = flags.FlagValues()
  module.define(values)
  lines = []
  for flag in sorted(values):
    default = values[flag].default
    tail = '' if default in (None, '') else f' (default: {default})'
    lines.append(f'  --{flag}: {values[flag].help}{tail}')
  if module.WITH_CONFIG:
    lines.append(
      '  --config.<section>.<field>: any field of the config, such as '
      '--config.optim.lr=1e-4'
    )
  return '\n'.join(
    [f'scar {name}: {module.ABOUT}', '', *lines, '', f'  {module.EXAMPLE}']
  )


def _write(text: str) -> None:
  sys.stdout.write(text + '\n')


def _fail(text: str, status: int) -> int:
  sys.stderr.write(f'error: {text}\n')
  return status


if __name__ == '__main__':
  sys.exit(main())
