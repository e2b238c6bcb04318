"""From the words of a command line to flag values and config overrides.

In: the words after `scar <command>`. Out: `Args`, or a ValueError that names
the nearest known option. Values mean the same however they are written:
`--flag value`, `--flag=value`, `--some-flag`; false, no, 0 and off are false.
"""

import dataclasses
import importlib.util
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from scar_jax.config_values import BOOLEAN_WORDS, nearest, read_value

_CONFIG = 'config.'
# What other tools call our fields; only used to point at the right one.
SYNONYMS: Mapping[str, str] = {
  'learning_rate': 'config.optim.lr',
  'lr': 'config.optim.lr',
  'weight_decay': 'config.optim.weight_decay',
  'batch_size': 'config.data.batch',
  'image_size': 'config.data.image_size',
  'mixed_precision': 'config.model.dtype',
  'precision': 'config.model.dtype',
  'max_steps': 'config.train.steps',
  'steps': 'config.train.steps',
  'gradient_accumulation_steps': 'config.train.accum',
  'seed': 'config.seed',
  'output_dir': 'workdir',
  'checkpoint': 'workdir',
}


@dataclasses.dataclass
class Args:
  """A parsed command line.

  Attributes:
    flags: values by name, `args.flags.workdir`.
    overrides: dotted config field -> text.
  """

  flags: flags.FlagValues
  overrides: dict[str, str]


def parse(
  command: str,
  words: Iterable[str],
  define: Callable[[flags.FlagValues], None],
  with_config: bool = False,
) -> Args:
  """Reads the words of one command.

  Args:
    command: its name, for messages.
    words: what follows it.
    define: declares its flags.
    with_config: accept `--config.a.b=v`.

  Raises:
    ValueError: an unknown option, a value of the wrong type, a stray word.
  """
  values = flags.FlagValues()
  define(values)
  overrides: dict[str, str] = {}
  plain: list[str] = []
  rest = list(words)
  while rest:
    word = rest.pop(0)
    if not re.match(r'--?[A-Za-z]', word):
      raise ValueError(
        f'scar {command}: stray word {word!r}; options start with --'
      )
    name, sep, value = word.lstrip('-').partition('=')
    if name.startswith(_CONFIG) and with_config:
      field = name.removeprefix(_CONFIG).replace('-', '_')
      overrides[field] = value if sep else _next(rest, name, boolean=True)
      continue
    name = name.replace('-', '_')
    negated = name.startswith('no') and name[2:] in values
    if negated and values[name[2:]].boolean and not sep:
      plain.append(f'--{name}')
      continue
    if name not in values:
      raise _unknown(command, name, values, with_config)
    boolean = bool(values[name].boolean)
    value = value if sep else _next(rest, name, boolean)
    if boolean:
      value = str(read_value(name, bool, value)).lower()
    plain.append(f'--{name}={value}')
  try:
    values([f'scar {command}', *plain])
  except flags.Error as error:
    raise ValueError(f'scar {command}: {error}') from None
  return Args(values, overrides)


def _next(rest: list[str], name: str, boolean: bool) -> str:
  """The value of an option that was written without '='."""
  number = bool(rest) and bool(re.match(r'-\d', rest[0]))
  has_value = bool(rest) and (number or not rest[0].startswith('-'))
  if boolean and not (has_value and rest[0].lower() in BOOLEAN_WORDS):
    # `--flag` alone is true; a config field may take any word after it.
    return rest.pop(0) if has_value and name.startswith(_CONFIG) else 'true'
  if not has_value:
    raise ValueError(f'--{name} needs a value: --{name}=...')
  return rest.pop(0)


def _unknown(
  command: str, name: str, values: flags.FlagValues, with_config: bool
) -> ValueError:
  own = [n for n in values if values[n].help]
  targets = {n: n for n in own}
  if with_config:
    targets = {**SYNONYMS, **targets}
  hint = nearest(name, targets)
  if hint:
    found = hint.split("'")[1]
    hint = f' Did you mean --{targets[found]}?'
  return ValueError(
    f'scar {command} has no option --{name}.{hint} '
    f'Known: {", ".join("--" + n for n in sorted(own))}'
    + (' and --config.<section>.<field>' if with_config else '')
  )


def load_config(text: str, overrides: Mapping[str, str]) -> dict[str, Any]:
  """Runs `get_config` of a config file and lays the overrides over it.

  Args:
    text: `path/to/file.py` or `path/to/file.py:argument`.
    overrides: dotted field -> text; judged by `config.check` afterwards.

  Raises:
    ValueError: no such file, or it has no `get_config`.
  """
  config = load_function(text, 'get_config', 'config')
  raw = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
  lay_over(raw, overrides)
  return raw


def load_function(text: str, function: str, flag: str) -> Any:
  """What a function of a Python file returns.

  Args:
    text: `path/to/file.py`, or with a colon the argument of the function.
    function: its name; it takes the argument, or None.
    flag: that the text was given with, for messages.

  Raises:
    ValueError: no such file, or no such function in it.
  """
  name, _, argument = text.partition(':')
  path = pathlib.Path(name)
  if not path.is_file():
    folder = path.parent
    near = [p.name for p in folder.glob('*.py')] if folder.is_dir() else []
    raise ValueError(
      f'--{flag}={text!r}: no file {name}.{nearest(path.name, near)}'
    )
  module = _run_file(path.resolve())
  if not hasattr(module, function):
    raise ValueError(f'--{flag}={text!r}: {name} has no {function}(arg)')
  return getattr(module, function)(argument or None)


def lay_over(raw: dict[str, Any], overrides: Mapping[str, str]) -> None:
  """Sets dotted fields of a nested config in place.

  Raises:
    ValueError: a field below one that is no section.
  """
  for field, value in overrides.items():
    _set(raw, field.split('.'), value, field)


def _run_file(path: pathlib.Path) -> Any:
  # Config files import their shared helpers as `configs.common`.
  roots = [p.parent for p in path.parents if p.name == 'configs']
  root = str(roots[0] if roots else path.parent)
  spec = importlib.util.spec_from_file_location(f'_config_{path.stem}', path)
  if spec is None or spec.loader is None:
    raise ValueError(f'--config={path}: not a Python file')
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, root)
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(root)
  return module


def _set(tree: dict[str, Any], keys: list[str], value: str, name: str) -> None:
  for key in keys[:-1]:
    tree = tree.setdefault(key, {})
    if not isinstance(tree, dict):
      raise ValueError(f'--config.{name}: {key} is a value, not a section')
  tree[keys[-1]] = value
