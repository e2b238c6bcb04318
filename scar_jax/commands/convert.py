"""`scar convert`: public checkpoints to artifacts, and back.

In: a PyTorch or safetensors checkpoint; with `--reverse` an artifact; with
`--selftest` a directory of fixtures. Out: an artifact that `--config.tokenizer.
artifact=DIR` and the like take; a safetensors file under the reference's names;
a table of errors against the reference. Half-written results are never left.
"""

import dataclasses
import pathlib
import shutil
from typing import Any

from absl import flags

from scar_jax.commands.parsing import Args
from scar_jax.commands.sampling_flags import required

ABOUT = 'Turn a public checkpoint into an artifact, or an artifact into one.'
EXAMPLE = (
  'scar convert llamagen-vq --checkpoint=vq_ds16_c2i.pt --out=artifacts/vq16'
)
WITH_CONFIG = False
POSITIONAL = 'family'
_TEXTS = {
  'checkpoint': 'File, index of shards or directory; an artifact to --reverse.',
  'out': 'Directory of the artifact; with --reverse a .safetensors file.',
  'size': 'Published size that the checkpoint must have, such as XL.',
  'selftest': 'Compare with the fixtures in this directory, convert nothing.',
  'json': 'File for the report.',
  'part': 'Of CLIP: vision, text or both; vision by default.',
  'normalize': 'Of the pixels that a ViT sees: pm1, imagenet or clip.',
  'features': 'What a DINOv2 gives: last or last4; last by default.',
  'tokenizer': 'Artifact to record in a model as its tokenizer.',
  'encoder': 'Artifact to record in a model as its encoder.',
  'text': 'Artifact to record in a model as its T5.',
}
_TABLE_WIDTH = 110
# Keywords of the families' `detect`: what no tensor shows.
_HINTS = (
  *('heads', 'head_dim', 'text_heads', 'image_size', 'patch_nums'),
  *('part', 'normalize', 'layers', 'features'),
  *('tokenizer', 'encoder', 'text'),
)


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  from scar_jax.convert.families import FAMILIES
  from scar_jax.convert.readers import WEIGHTS

  names = ', '.join(f.name for f in FAMILIES)
  texts = {'family': f'One of {names}; detected if not given.', **_TEXTS}
  for name, about in texts.items():
    flags.DEFINE_string(name, None, about, flag_values=values)
  flags.DEFINE_enum(
    'weights', 'auto', WEIGHTS,
    'Moving average or plain weights, where a file has both; auto: average.',
    flag_values=values,
  )  # fmt: skip
  for name, about in {
    'heads': 'Attention heads, where the size is not a published one.',
    'head_dim': 'Channels of one head, the same.',
    'text_heads': "Attention heads of CLIP's text tower, the same.",
    'image_size': 'Pixels of the images, where no tensor says it.',
  }.items():
    flags.DEFINE_integer(name, None, about, lower_bound=1, flag_values=values)
  flags.DEFINE_list(
    'patch_nums', None, 'Sides of the scales of a VAR tokenizer: 1,2,3,...',
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_list(
    'layers', None, 'Blocks, from 0, that Depth Anything reads; V2\'s by '
    'default.', flag_values=values,
  )  # fmt: skip
  for name, about in {
    'reverse': 'From an artifact to a reference-named safetensors file.',
    'allow_missing': 'Draw parameters that have no tensor at random.',
    'allow_unexpected': 'Leave out tensors that have no parameter.',
  }.items():
    flags.DEFINE_bool(name, False, about, flag_values=values)


def run(args: Args) -> str:
  """Converts, or tests; returns the closing line.

  Raises:
    ValueError: see `convert_file`, `reverse_file`, `run_selftest`.
  """
  given = args.flags
  if given.selftest:
    return run_selftest(given.selftest, given.json)
  required(given, EXAMPLE, 'checkpoint', 'out')
  if given.reverse:
    return reverse_file(given)
  return convert_file(given)


def convert_file(given: flags.FlagValues) -> str:
  """One checkpoint to one artifact.

  Raises:
    ValueError: an unreadable file, another family or size than asked for,
      tensors that do not fit, or a place that holds something else.
  """
  from scar_jax.artifacts import save_artifact
  from scar_jax.commands.console import say
  from scar_jax.convert import families
  from scar_jax.convert.readers import open_checkpoint
  from scar_jax.convert.report import Report, recording
  from scar_jax.eval.report import write_json

  out = _free_place(pathlib.Path(given.out))
  state = open_checkpoint(given.checkpoint, given.weights)
  family = families.detect_family(state, given.family)
  hints = {name: given[name].value for name in _HINTS}
  cfg = families.detect_config(family, state.shapes, _numbers(hints))
  size = families.size_name(family, cfg)
  if given.size not in (None, size):
    raise ValueError(
      f'--size={given.size!r}, but {given.checkpoint} has the size {size!r} '
      f'({cfg}); accepted: {size}, or leave --size out'
    )
  report = Report(given.allow_missing, given.allow_unexpected, lazy=True)
  report.notes += [f'{given.checkpoint}: {family.name}, size {size}']
  report.notes += state.notes
  report.unexpected |= {k: v.shape for k, v in state.extras.items()}
  with recording(report):
    params = family.load().convert(cfg, state)
  for line in report.lines():
    say(line)
  kind, cfg, params = families.as_artifact(family, cfg, params)
  meta = {
    'family': family.name,
    'size': size,
    'source': pathlib.Path(given.checkpoint).name,
    'weights': given.weights,
    'tensors': report.counts(),
  }
  if report.drawn:
    meta['drawn'] = report.drawn
  try:
    mark = save_artifact(out, kind, cfg, params, meta)
  except BaseException:
    shutil.rmtree(out.with_name(f'{out.name}.part'), ignore_errors=True)
    raise
  if given.json:
    written = {
      **meta,
      'fingerprint': mark,
      'config': dataclasses.asdict(cfg),
      'report': report.as_dict(),
    }
    write_json(given.json, written)
  return (
    f'{out}: {kind} artifact, {family.name} {size}, '
    f'{_parameters(params) / 1e6:.1f}M parameters, {mark}'
  )


def reverse_file(given: flags.FlagValues) -> str:
  """One artifact to one safetensors file.

  Raises:
    ValueError: no artifact, a family without a way back, another ending.
  """
  from safetensors.numpy import save_file

  from scar_jax.artifacts import load_artifact
  from scar_jax.convert import families

  out = pathlib.Path(given.out)
  if out.suffix != '.safetensors' or out.is_dir():
    raise ValueError(
      f'--out={given.out!r} with --reverse; accepted: a .safetensors file'
    )
  artifact = load_artifact(given.checkpoint)
  known = artifact.meta.get('family')
  name = given.family or known or _guess(artifact)
  if known and name != known:
    raise ValueError(
      f'FAMILY={name!r}, but {given.checkpoint} came from {known!r}; accepted: '
      f'{known}, or leave FAMILY out'
    )
  family = families.find_family(name)
  tensors = families.reverse_tensors(family, artifact.config, artifact.params)
  note = {'family': family.name, 'fingerprint': artifact.fingerprint}
  out.parent.mkdir(parents=True, exist_ok=True)
  part = out.with_name(f'.{out.name}.part')
  try:
    save_file(tensors, part, note)
    part.replace(out)
  finally:
    part.unlink(missing_ok=True)
  return f'{out}: {len(tensors)} tensors in the names of {family.name}'


def run_selftest(folder: str, json_file: str | None = None) -> str:
  """Compares every fixture of a directory; prints the table.

  Raises:
    ValueError: no fixtures there, or outputs outside of their tolerance.
  """
  from rich.console import Console

  from scar_jax.commands.console import say
  from scar_jax.convert import selftest
  from scar_jax.eval.report import print_table, write_json

  results = selftest.run(folder, progress=say)
  rows = {r.fixture: r.row() for r in results}
  # Wider than a pipe's 80 columns, so that no name is cut.
  print_table(rows, f'parity with {folder}', Console(width=_TABLE_WIDTH))
  if json_file:
    write_json(json_file, {r.fixture: r.as_dict() for r in results})
  failed = [r for r in results if not r.passed]
  if failed:
    raise ValueError(
      f'{len(failed)} of {len(results)} fixtures failed: '
      + '; '.join(f'{r.fixture}: {r.reason()}' for r in failed)
    )
  return f'{len(results)} fixtures, all within tolerance'


def _free_place(out: pathlib.Path) -> pathlib.Path:
  """Refuses to replace anything but an artifact."""
  old = (out / 'config.json').is_file() and (out / 'params').is_dir()
  if out.exists() and not old and not (out.is_dir() and not any(out.iterdir())):
    raise ValueError(
      f'--out={str(out)!r} exists and is no artifact; accepted: a new or empty '
      'directory, or an artifact to replace'
    )
  return out


def _numbers(hints: dict[str, Any]) -> dict[str, Any]:
  """The hints, lists of texts turned into numbers."""
  read = {}
  for name in ('patch_nums', 'layers'):
    values = hints[name]
    if values is None:
      continue
    if not all(value.strip().isdecimal() for value in values):
      raise ValueError(
        f'--{name}={",".join(values)}; accepted: whole numbers with commas'
      )
    read[name] = tuple(int(value) for value in values)
  return hints | read


def _guess(artifact: Any) -> str:
  """Family of an artifact that was trained here."""
  if artifact.kind == 'scar':
    model = artifact.config.model
    if model.order == 'scale':
      return 'var'
    known = {'off': 'llamagen-gpt', 'vq': 'editar'}
    return known.get(model.prefix.compress, 'scar')
  if artifact.kind == 'tokenizer':
    scales = hasattr(artifact.config, 'patch_nums')
    return 'var-vqvae' if scales else 'llamagen-vq'
  raise ValueError(
    f'{artifact.path} is a {artifact.kind!r} artifact of no recorded family; '
    'accepted: a tokenizer or a model, or one that scar convert made'
  )


def _parameters(params: Any) -> int:
  import jax

  return sum(x.size for x in jax.tree.leaves(params))
