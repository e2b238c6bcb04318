"""Accuracy and speed of trained models of several orders, in one table.

In: the directories of finished quickstarts, one for each order. Out: a row for
each: accuracy and background of its held-out edits as `scar eval` has scored
them, and seconds per image, measured here on sources of the same edits, from
pictures and prompts to pictures.
"""

import functools
import json
import pathlib
from typing import Any

from scar_jax.bench.timing import Report, machine, measure
from scar_jax.config import check
from scar_jax.data.sources import make_source
from scar_jax.editor import Editor
from scar_jax.eval.run import HELD_OUT
from scar_jax.sampling_steps import sampling_order

# What `scar eval` calls a right edit, by source.
_ACCURACY = {'openmoji': 'tone_accuracy', 'scenes': 'changed_exact'}


def run(given: Any) -> Report:
  """Measures; `given` are the flags of `scar bench`.

  Raises:
    ValueError: no directory, or one without a trained and scored model.
  """
  if not given.workdirs:
    raise ValueError(
      '--workdirs not given; accepted: directories of finished quickstarts '
      'with commas (OUT of launch/quickstart.sh)'
    )
  work, rows, counts = {}, {}, {}
  for place in given.workdirs:
    home = pathlib.Path(place)
    config: Any = check(_json(home / 'edit' / 'config.json')['config'])
    splits = _json(home / 'eval_edit' / 'scores.json')['splits']
    source, order = config.data.source, config.order.name
    split = HELD_OUT[source][0]
    editor = Editor.load(home / 'edit')
    records = make_source(config.data, split)
    some = [records.load(i, None) for i in range(editor.cfg.batch)]
    pictures: Any = [r.condition for r in some]
    prompts = [r.text for r in some]
    work[place] = functools.partial(editor, pictures, prompts)
    steps = sampling_order(editor.cfg.model, editor.cfg.sample).set_sizes
    counts[place] = len(some)
    rows[place] = {
      'order': order,
      'steps': len(steps),
      'source': source,
      'edit_accuracy': splits[split][_ACCURACY[source]],
      'background_psnr': splits[split]['background_psnr'],
    }
  seconds = measure(work, given.repeats)
  for place, row in rows.items():
    row['seconds_per_image'] = seconds[place][1] / counts[place]
  settings = {**machine(), 'repeats': given.repeats}
  return Report(settings, list(rows.values()), lambda row: row['order'])


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f'--workdirs={str(path.parent.parent)!r}: {path}: {error}; accepted: '
      'directories of finished quickstarts (OUT of launch/quickstart.sh)'
    ) from error
