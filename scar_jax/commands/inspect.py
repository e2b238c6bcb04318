"""`scar inspect`: what a trained model looks at, as one picture.

In: `--workdir --image --prompt`, where known `--target`. Out: a PNG with the
attention of the targets to the prefix, principal components of the features
before and after compression, prefix states beside those of the target, and the
entropy of every token; where asked the means as JSON.
"""

from absl import flags

from scar_jax.commands.parsing import Args
from scar_jax.commands.sampling_flags import required

ABOUT = 'Draw attention, features, prefix states and entropies of one edit.'
EXAMPLE = (
  'scar inspect --workdir=runs/edit --image=in.png --prompt="dark skin" '
  '--out=inspect.png'
)
WITH_CONFIG = False


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  for name, about in {
    'workdir': 'Work directory or artifact of a trained model.',
    'image': 'Picture to edit, or control map.',
    'prompt': 'Instruction or caption; empty is no text.',
    'target': 'The true result: its tokens are gone through in place of those '
    'that the model draws.',
    'out': 'PNG file.',
    'json': 'File for the means.',
    'tokenizer': 'Use this tokenizer in place of the recorded one.',
    'encoder': 'Use this encoder in place of the recorded one.',
    'text': 'Use this T5 in place of the recorded one.',
  }.items():
    flags.DEFINE_string(name, None, about, flag_values=values)
  flags.DEFINE_integer('label', None, 'Class number.', flag_values=values)
  flags.DEFINE_integer('seed', 0, 'Of the draws.', flag_values=values)


def run(args: Args) -> str:
  """Looks and draws; returns the closing line."""
  from scar_jax.commands.console import say
  from scar_jax.editor import Editor
  from scar_jax.eval.inspect import inspect
  from scar_jax.eval.inspect_picture import draw
  from scar_jax.eval.report import write_json

  given = args.flags
  required(given, EXAMPLE, 'workdir', 'image', 'out')
  editor = Editor.load(
    given.workdir,
    tokenizer=given.tokenizer,
    encoder=given.encoder,
    text=given.text,
    batch=1,
  )
  found = inspect(
    editor,
    given.image,
    given.prompt or '',
    given.label,
    given.target,
    given.seed,
  )
  draw(found, given.prompt or str(given.image), given.out)
  summary = found.summary()
  for name, value in summary.items():
    say(f'{name.replace("_", " "):<22} {value:.3f}')
  if given.json:
    write_json(given.json, summary)
  return str(given.out)
