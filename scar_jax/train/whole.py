"""Which entries of a checkpoint folder are whole checkpoints.

In: the folder that orbax writes steps to. Out: the steps that may be read, and
one line for every entry that may not. Nothing is ever deleted here.
"""

import json
from collections.abc import Iterator
from typing import Any

from etils import epath
from orbax.checkpoint.path import step as step_lib

ITEMS = ('params', 'train_state', 'data', 'meta')


def unwhole_reason(path: epath.Path) -> str | None:
  """Why an entry of a checkpoint folder is not a whole checkpoint, or None."""
  if not path.name.isdigit():
    return 'its name is not a step number'
  if not path.is_dir():
    return 'not a directory'
  try:
    mark = json.loads((path / '_CHECKPOINT_METADATA').read_text())
  except (OSError, ValueError):
    return 'no commit mark: it was cut while being written'
  if not mark.get('commit_timestamp_nsecs'):
    return 'not committed: it was cut while being written'
  missing = [item for item in ITEMS if not (path / item).is_dir()]
  return f'without {", ".join(missing)}' if missing else None


def scan(folder: epath.PathLike) -> tuple[list[int], list[str]]:
  """Whole steps in numeric order, and one line for each other entry."""
  folder = epath.Path(folder)
  steps, ignored = [], []
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    reason = unwhole_reason(path)
    if reason:
      ignored.append(f'ignored {path.name} in {folder}: {reason}')
    else:
      steps.append(int(path.name))
  return sorted(steps), ignored


class WholeSteps:
  """Names steps as orbax does; shows it only whole checkpoints.

  Else a stale entry would count as a kept checkpoint, push out a good one, or
  make the next save at its step a silent no-op.
  """

  single_host_load_and_broadcast = False

  def __init__(self) -> None:
    self._inner = step_lib.standard_name_format()

  def build_name(self, step: int) -> str:
    return self._inner.build_name(step)

  def find_all(self, base_path: Any) -> Iterator[Any]:
    for found in self._inner.find_all(base_path):
      if not unwhole_reason(epath.Path(found.path)):
        yield found

  def find_step(self, base_path: Any, step: int) -> Any:
    return self._inner.find_step(base_path, step)
