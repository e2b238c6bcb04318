"""`scar edit`: one image and one prompt to one image.

In: `--workdir --image --prompt --out`, and `--mask` to draw a part anew. Out: a
picture of the same size.
"""

import pathlib

from absl import flags

from scar_jax.commands import sampling_flags as shared
from scar_jax.commands.parsing import Args

ABOUT = 'Edit or colour one image with a trained model.'
EXAMPLE = (
  'scar edit --workdir=runs/edit --image=in.png --prompt="dark skin" '
  '--out=out.png'
)
WITH_CONFIG = False


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  shared.define(values)
  for name, about in {
    'image': 'Picture to edit, or line art to colour; any format and size.',
    'prompt': 'Instruction or caption; empty is no text.',
    'control': 'The picture is a photo: make this map of it first, such as '
    'canny.',
    'control_weights': 'Of the network that draws it, as scar controls '
    '--weights.',
    'mask': 'Picture of the same size: white is drawn anew, black is kept '
    'exactly. Needs a model of the random order.',
    'out': 'Where the result goes; its ending is its format.',
  }.items():
    flags.DEFINE_string(name, None, about, flag_values=values)
  flags.DEFINE_integer('label', None, 'Class number.', flag_values=values)


def run(args: Args) -> str:
  """Edits; returns the closing line."""
  from PIL import Image

  from scar_jax.commands.console import say
  from scar_jax.data.transforms import decode
  from scar_jax.eval.report import write_atomic

  given = args.flags
  shared.required(given, EXAMPLE, 'workdir', 'out')
  out = pathlib.Path(given.out)
  ending = out.suffix.lower()
  formats = Image.registered_extensions()
  if formats.get(ending) not in Image.SAVE:
    raise ValueError(
      f'--out={given.out!r} has the ending {ending!r}; accepted: .png, .jpg, '
      '.webp and others that Pillow writes'
    )
  picture = None if given.image is None else decode(given.image)
  editor = shared.load_editor(given)
  say(
    f'editing {given.image} with {given.prompt!r}, seed {given.seed}, '
    f'into {given.out}'
  )
  [result] = editor(
    None if picture is None else [picture],
    None if given.prompt is None and picture is not None else [given.prompt],
    labels=None if given.label is None else [given.label],
    masks=None if given.mask is None else [given.mask],
    control=given.control,
    control_weights=given.control_weights,
    seed=given.seed,
    **shared.settings(given),
  )
  write_atomic(out, lambda file: result.save(file, format=formats[ending]))
  return f'{out}: {result.width} x {result.height}'
