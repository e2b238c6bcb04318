"""Flags that `scar edit`, `scar sample` and `scar eval` share.

In: flag values. Out: an `Editor` and the settings of its call. A flag that is
not given leaves the default that the model was trained with.
"""

import json
import pathlib
from typing import Any

from absl import flags

_FLOATS = {
  'guidance': 'Strength of the text; 1 is off.',
  'guidance_image': 'Strength of the condition image; 1 is off.',
  'temperature': '0 is greedy.',
  'top_p': 'Keep the most likely codes up to this mass; 1 is all.',
  'schedule_noise': 'Of --schedule=confidence: how much chance joins in.',
}
_COUNTS = {
  'top_k': 'Keep this many codes; 0 is all.',
  'num_sets': 'Steps of the random order; 0 is as trained.',
}
_CHOICES = {
  'ramp': 'Guidance grows with the steps done, or with the tokens known.',
  'schedule': 'Of the random order: any places next, or those the model is '
  'surest of.',
}
SETTINGS = (*_FLOATS, *_COUNTS, *_CHOICES, 'smooth', 'mean_code')


def define(values: flags.FlagValues) -> None:
  """Declares them."""
  from scar_jax.filters import RAMPS, SCHEDULES

  def text(name: str, about: str) -> None:
    flags.DEFINE_string(name, None, about, flag_values=values)

  text('workdir', 'Work directory or artifact of a trained model.')
  text('tokenizer', 'Use this tokenizer in place of the recorded one.')
  text('encoder', 'Use this encoder in place of the recorded one.')
  text('text', 'Use this T5 in place of the recorded one.')
  for name, about in _FLOATS.items():
    flags.DEFINE_float(name, None, about, flag_values=values)
  flags.DEFINE_boolean(
    'smooth', None, 'Mix codes in place of drawing one (scale order).',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_boolean(
    'mean_code', None, 'Decode the mean of the likely codes (other orders).',
    flag_values=values,
  )  # fmt: skip
  for name, about in _COUNTS.items():
    flags.DEFINE_integer(name, None, about, lower_bound=0, flag_values=values)
  accepted = {'ramp': RAMPS, 'schedule': SCHEDULES}
  for name, about in _CHOICES.items():
    flags.DEFINE_enum(name, None, accepted[name], about, flag_values=values)
  text(
    'dtype',
    'Of matrix products: float32 or bfloat16, the default on accelerators.',
  )
  text('weights', "int8 keeps the model's weights in 8 bits.")
  text(
    'cache',
    'Folder for compiled programs, which later commands start '
    "from; '' keeps none. $SCAR_CACHE or ~/.cache/scar_jax by default.",
  )
  flags.DEFINE_integer('seed', 0, 'Of the first image.', flag_values=values)
  flags.DEFINE_integer(
    'batch', None, 'Images made together.', lower_bound=1, flag_values=values
  )


def required(given: flags.FlagValues, example: str, *names: str) -> None:
  """Refuses a command line that lacks a flag.

  Raises:
    ValueError: names all that are missing.
  """
  missing = [f'--{name}' for name in names if given[name].value in (None, '')]
  if missing:
    raise ValueError(f'{", ".join(missing)} not given. Example: {example}')


def load_editor(given: flags.FlagValues, one_size: bool = False) -> Any:
  """The `Editor` of `--workdir`.

  Args:
    given: flags; those of `scar sample` name a mesh too.
    one_size: every batch is filled up to the largest.
  """
  from scar_jax import paths
  from scar_jax.artifacts import read_description
  from scar_jax.editor import Editor
  from scar_jax.editor_inputs import buckets
  from scar_jax.programs import use_compilation_cache
  from scar_jax.sharding import batch_ways

  folder = None
  if given.cache != '':
    folder = paths.cache_dir(given.cache or '') / 'programs'
    use_compilation_cache(folder)
  mesh = _mesh(given.mesh) if 'mesh' in given else None
  batch = given.batch
  if one_size:
    if batch is None:
      batch = read_description(given.workdir)['config'].get('batch', 1)
    batch = buckets(batch, batch_ways(mesh) if mesh else 1)[-1]
  return Editor.load(
    given.workdir,
    tokenizer=given.tokenizer,
    encoder=given.encoder,
    text=given.text,
    batch=batch,
    **precision(given),
    mesh=mesh,
    cache=folder,
    buckets=(batch,) if one_size else None,
  )


def _mesh(text: str | None) -> Any:
  """The mesh of a flag; of all devices of this process on accelerators."""
  import jax

  from scar_jax.commands.plan import mesh_overrides
  from scar_jax.sharding import make_mesh

  devices = jax.local_devices()
  several = len(devices) > 1 and devices[0].platform != 'cpu'
  text = text or ('data:-1' if several else '')
  if not text:
    return None
  sizes = mesh_overrides(text)
  return make_mesh(
    {k.removeprefix('mesh.'): int(v) for k, v in sizes.items()}, devices
  )


def precision(given: flags.FlagValues) -> dict[str, str]:
  """Arguments of `Editor.load` on types, those that were given."""
  found = {name: given[name].value for name in ('dtype', 'weights')}
  return {name: value for name, value in found.items() if value is not None}


def settings(given: flags.FlagValues) -> dict[str, Any]:
  """Keyword arguments of a call of the editor, those that were given."""
  found = {name: given[name].value for name in SETTINGS}
  return {name: value for name, value in found.items() if value is not None}


def same_settings(folder: pathlib.Path, used: dict[str, Any]) -> None:
  """Notes what a folder of images is made with; two settings do not mix.

  Raises:
    ValueError: what lies there was made with others; lists them.
  """
  from scar_jax.config import differences
  from scar_jax.eval.report import write_json

  path = folder / 'settings.json'
  if path.exists():
    changed = differences(json.loads(path.read_text()), used)
    if changed:
      raise ValueError(
        f'{folder} holds images of other settings: {"; ".join(changed)}; '
        'accepted: the same settings, or another --out'
      )
  write_json(path, used)
