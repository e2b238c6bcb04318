"""What the fields of a record are called, and which ones a kind needs.

In: names found in a file (columns, keys, members of a tar). Out: which of them
is the target, the condition, the text and so on, or an error that shows what
was expected and what was found. Shared by all sources that read such files.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from scar_jax.config_values import nearest
from scar_jax.data.records import RecordError

# Of a role, the first name that is found is used.
FIELDS: Mapping[str, tuple[str, ...]] = {
  'target': (
    *('target', 'target_image', 'target_img', 'edited_image', 'output'),
    *('image', 'img'),
  ),
  'condition': (
    *('source', 'source_image', 'source_img', 'original_image', 'input'),
    *('control', 'control_image', 'conditioning_image', 'condition'),
  ),
  'text': (
    *('instruction', 'edit_prompt', 'prompt', 'caption', 'text', 'txt'),
  ),
  'label': ('label', 'class', 'cls'),
  'mask': ('mask', 'mask_image', 'mask_img'),
}
# What each kind of record must have.
KINDS: Mapping[str, tuple[str, ...]] = {
  'edit': ('target', 'condition', 'text'),
  'control': ('target', 'condition'),
  'depth': ('target', 'condition'),  # control, stretched by min and max
  'class': ('target', 'label'),
  'image': ('target',),
}


@dataclasses.dataclass(frozen=True)
class Fields:
  """Accepted names of each role, for one kind of record.

  Args:
    kind: key of `KINDS`.
    columns: (role, name) pairs that take the place of the accepted names.
    names: accepted names by role, where a data set has its own.

  Raises:
    ValueError: an unknown kind or role.
  """

  kind: str
  columns: tuple[tuple[str, str], ...] = ()
  names: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=lambda: FIELDS
  )

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f'data.kind={self.kind!r}; accepted: {", ".join(KINDS)} (set'
        f' --config.data.kind){nearest(self.kind, KINDS)}'
      )
    for role, _ in self.columns:
      if role not in FIELDS:
        raise ValueError(
          f'data.columns names the role {role!r}; accepted:'
          f' {", ".join(FIELDS)}, as in --config.data.columns=target=edited'
        )

  @property
  def required(self) -> tuple[str, ...]:
    return KINDS[self.kind]

  def accepted(self, role: str) -> tuple[str, ...]:
    """Names of a role, the preferred first."""
    chosen = tuple(name for r, name in self.columns if r == role)
    return chosen or self.names.get(role, ())

  def match(self, found: Iterable[str]) -> dict[str, str]:
    """Role -> name, of the roles that are there."""
    found = set(found)
    matched = {}
    for role in FIELDS:
      name = next((n for n in self.accepted(role) if n in found), None)
      if name is not None:
        matched[role] = name
    return matched

  def check_record(
    self, matched: Mapping[str, Any], found: Iterable[str], key: str
  ) -> None:
    """Refuses one record that lacks what its kind needs.

    Raises:
      RecordError: shows the names accepted and found.
    """
    for role in self.required:
      if role not in matched:
        raise RecordError(key, self._missing(role, found))

  def check_schema(self, found: Iterable[str], where: str) -> dict[str, str]:
    """`match` for a whole data set, judged before the first record is read.

    Raises:
      ValueError: something is missing; shows the names accepted and found.
    """
    found = list(found)
    matched = self.match(found)
    lacking = [r for r in self.required if r not in matched]
    if lacking:
      reasons = '; '.join(self._missing(role, found) for role in lacking)
      raise ValueError(
        f'{where}: {reasons}. Kind {self.kind!r} needs'
        f' {", ".join(self.required)} (set --config.data.kind, or name the'
        f' column: --config.data.columns={lacking[0]}=NAME)'
      )
    return matched

  def _missing(self, role: str, found: Iterable[str]) -> str:
    wanted = 'instruction' if role == 'text' else role
    names = ', '.join(self.accepted(role)) or 'none, name one'
    listed = ', '.join(map(repr, found)) or 'nothing'
    return f'no {wanted}; accepted names: {names}; found: {listed}'


def checked_label(value: Any, name: str, key: str) -> int:
  """A class id.

  Raises:
    RecordError: not a whole number >= 0.
  """
  whole = isinstance(value, int) and not isinstance(value, bool)
  if whole and value >= 0:
    return value
  raise RecordError(
    key, f'field {name!r} is {value!r}; accepted: a whole number >= 0'
  )
