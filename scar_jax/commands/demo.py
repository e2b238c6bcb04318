"""`scar demo`: a page on which people try a trained model.

In: `--workdir`. Out: a web page on this machine, which works without a network.
"""

import pathlib
import tempfile
from typing import Any

from absl import flags

from scar_jax.commands import sampling_flags as shared
from scar_jax.commands.parsing import Args

ABOUT = 'Serve a page to try a trained model on.'
EXAMPLE = 'scar demo --workdir=runs/edit --port=7860'
WITH_CONFIG = False
_EXAMPLES = 6


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  from scar_jax.demo.limits import Limits

  shared.define(values)
  flags.DEFINE_string(
    'host', '127.0.0.1',
    'Address to listen on; 0.0.0.0 lets other machines in.',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    'port', 7860, 'Port; 0 takes a free one.', flag_values=values
  )
  flags.DEFINE_string(
    'examples', None,
    'Folder of pictures to start from; those the model is scored on by '
    'default.',
    flag_values=values,
  )  # fmt: skip
  for name, about in {
    'megabytes': 'Most of an uploaded file.',
    'megapixels': 'Most of an uploaded picture.',
  }.items():
    flags.DEFINE_float(name, getattr(Limits, name), about, flag_values=values)
  for name, about in {
    'queue': 'Requests that may wait.',
    'images': 'Pictures of one request.',
  }.items():
    flags.DEFINE_integer(
      name, getattr(Limits, name), about, lower_bound=1, flag_values=values
    )


def run(args: Args) -> str:
  """Serves until it is interrupted."""
  from scar_jax.commands.console import say
  from scar_jax.demo.limits import Limits
  from scar_jax.demo.page import Page

  given = args.flags
  shared.required(given, EXAMPLE, 'workdir')
  names = ('megabytes', 'megapixels', 'queue', 'images')
  chosen: dict[str, Any] = {name: given[name].value for name in names}
  limits = Limits(**chosen)
  editor = shared.load_editor(given)
  with tempfile.TemporaryDirectory(prefix='scar_demo_') as folder:
    page = Page(
      editor,
      given.workdir,
      pathlib.Path(folder),
      _examples(given, editor),
      limits,
    )
    address = page.serve(given.host, given.port, block=False)
    say(f'{address} serves {given.workdir}; Ctrl-C ends it')
    page.blocks.block_thread()
  return ''


def _examples(given: flags.FlagValues, editor: Any) -> list[Any]:
  """Pictures of a folder, or of the held-out records of the run itself."""
  from absl import logging

  from scar_jax.data.controls import PICTURES
  from scar_jax.data.transforms import decode

  if given.examples:
    folder = pathlib.Path(given.examples)
    if not folder.is_dir():
      raise ValueError(f'--examples={given.examples!r}: no such folder')
    paths = [p for p in sorted(folder.iterdir()) if p.suffix in PICTURES]
    return [(decode(p), '') for p in paths[:_EXAMPLES]]
  try:
    return _held_out(pathlib.Path(given.workdir))
  except (ValueError, OSError, KeyError) as error:
    logging.info('demo: no examples: %s', error)
    return []


def _held_out(workdir: pathlib.Path) -> list[Any]:
  import json

  from scar_jax import config as config_lib
  from scar_jax.data.sources import make_source
  from scar_jax.eval.run import HELD_OUT

  path = workdir / 'config.json'
  config = config_lib.check(json.loads(path.read_text())['config'])
  source = make_source(config.data, HELD_OUT[config.data.source][0])
  found = []
  for i in range(0, len(source), max(1, len(source) // _EXAMPLES)):
    record = source.load(i, None)
    if record.condition is not None:
      found.append((record.condition, record.text or ''))
  return found[:_EXAMPLES]
