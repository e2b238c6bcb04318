"""What OpenMoji's pictures are, which of them make a pair, and the splits.

In: the drawings' code point sequences. Out: a `Catalog`: one `Picture` a
drawing (caption, base, tone, gender, hair, labels), the pairs of each kind of
edit, and for each picture the split that it belongs to. Everything follows
from code points and SHA-256, so it is the same on every machine.
"""

import bisect
import dataclasses
import functools
import hashlib
import re
from collections import defaultdict

from scar_jax.data.sources.openmoji_glyphs import Sequence
from scar_jax.extras import require

GENDERS = ('person', 'man', 'woman')
HAIRS = ('plain', 'red', 'curly', 'white', 'bald')
SPLITS = ('train', 'train_eval', 'new_edit', 'new_emoji')
PAIR_KINDS = ('tone', 'gender', 'hair')
# Shares that are kept out, in percent of bases (with and without tones) and
# of the toned bases whose one hashed tone becomes `new_edit`.
NEW_EMOJI_TONED, NEW_EMOJI_PLAIN, NEW_EDIT = 15, 8, 25

_TONES = dict(zip(range(0x1F3FB, 0x1F400), range(1, 6), strict=True))
_HAIR = {0x1F9B0: 1, 0x1F9B1: 2, 0x1F9B3: 3, 0x1F9B2: 4}
_SIGNS = {0x2642: 1, 0x2640: 2}
_PEOPLE = {0x1F9D1: 0, 0x1F468: 1, 0x1F469: 2}
_JOIN, _RIGHT, _PERSON = 0x200D, 0x27A1, 0x1F9D1
_FACING = (_JOIN, _RIGHT)
# Code points that are the gendered forms of another emoji: (same as, gender).
_FORMS = {
  0x1F466: (0x1F9D2, 1), 0x1F467: (0x1F9D2, 2), 0x1F9D2: (0x1F9D2, 0),
  0x1F474: (0x1F9D3, 1), 0x1F475: (0x1F9D3, 2), 0x1F9D3: (0x1F9D3, 0),
  0x1F934: (0x1FAC5, 1), 0x1F478: (0x1FAC5, 2), 0x1FAC5: (0x1FAC5, 0),
  0x1F57A: (0x1F483, 1), 0x1F483: (0x1F483, 2),
  0x1F385: (0x1F385, 1), 0x1F936: (0x1F385, 2),
  0x1F930: (0x1FAC4, 2), 0x1FAC3: (0x1FAC4, 1), 0x1FAC4: (0x1FAC4, 0),
}  # fmt: skip
# Bases that show the same things as another one, so they share a split.
_ALIAS = {
  (0x1F9D1, 0x1F384): (0x1F385,),
  (0x1F471,): (_PERSON,),
  (0x1F46B,): (_PERSON, 0x1F91D, _PERSON),
  (0x1F46C,): (_PERSON, 0x1F91D, _PERSON),
  (0x1F46D,): (_PERSON, 0x1F91D, _PERSON),
  (0x1F48F,): (_PERSON, 0x2764, 0x1F48B, _PERSON),
  (0x1F491,): (_PERSON, 0x2764, _PERSON),
  (0x1FAF1, 0x1FAF2): (0x1F91D,),
  (0x1FAF2,): (0x1FAF1,),
  (0x1FAF8,): (0x1FAF7,),
  (0x1F448,): (0x1F449,),
  (0x1F91C,): (0x1F91B,),
  (0x2B05,): (0x27A1,),
  (0x1F1ED, 0x1F1F2): (0x1F1E6, 0x1F1FA),
}
# First code point of each subgroup and its group; a subgroup reaches to the
# next one. Blocks of Unicode that hold one sort of thing each.
GROUPS = (
  'symbol', 'sky', 'plant', 'food', 'activity', 'place', 'animal', 'body',
  'person', 'clothing', 'object', 'face', 'transport', 'flag',
)  # fmt: skip
_RANGES = (
  (0x0, 0), (0x231A, 10), (0x2600, 1), (0x260E, 10), (0x2615, 3),
  (0x2618, 2), (0x261D, 7), (0x2620, 0), (0x2639, 11), (0x2640, 0),
  (0x26BD, 4), (0x26C4, 1), (0x26D3, 10), (0x26EA, 5), (0x26F3, 4),
  (0x26FA, 5), (0x2702, 10), (0x2708, 12), (0x2709, 10), (0x270A, 7),
  (0x270F, 10), (0x2712, 0), (0x2744, 1), (0x2747, 0), (0x1F1E6, 13),
  (0x1F200, 0), (0x1F300, 1), (0x1F32D, 3), (0x1F331, 2), (0x1F336, 3),
  (0x1F337, 2), (0x1F33D, 3), (0x1F33E, 2), (0x1F345, 3), (0x1F380, 4),
  (0x1F3C2, 8), (0x1F3C5, 4), (0x1F3CA, 8), (0x1F3CD, 12), (0x1F3CF, 4),
  (0x1F3D4, 5), (0x1F3F3, 13), (0x1F3F5, 4), (0x1F3FA, 10), (0x1F400, 6),
  (0x1F440, 7), (0x1F451, 9), (0x1F464, 8), (0x1F479, 11), (0x1F481, 8),
  (0x1F484, 9), (0x1F486, 8), (0x1F489, 10), (0x1F493, 0), (0x1F4A0, 10),
  (0x1F549, 0), (0x1F56F, 10), (0x1F574, 8), (0x1F576, 9), (0x1F577, 6),
  (0x1F579, 10), (0x1F57A, 8), (0x1F587, 10), (0x1F590, 7), (0x1F5A4, 0),
  (0x1F5A5, 10), (0x1F5E3, 8), (0x1F5E8, 0), (0x1F5FB, 5), (0x1F600, 11),
  (0x1F638, 6), (0x1F641, 11), (0x1F645, 8), (0x1F648, 6), (0x1F64B, 8),
  (0x1F680, 12), (0x1F6A3, 8), (0x1F6A4, 12), (0x1F6AA, 10), (0x1F6B2, 12),
  (0x1F6B4, 8), (0x1F6B7, 0), (0x1F6CB, 10), (0x1F6E9, 12), (0x1F7E0, 0),
  (0x1F90C, 7), (0x1F910, 11), (0x1F918, 7), (0x1F920, 11), (0x1F926, 8),
  (0x1F927, 11), (0x1F930, 8), (0x1F93F, 4), (0x1F950, 3), (0x1F970, 11),
  (0x1F97B, 9), (0x1F980, 6), (0x1F9B0, 8), (0x1F9B4, 7), (0x1F9B8, 8),
  (0x1F9BA, 9), (0x1F9BC, 12), (0x1F9C0, 3), (0x1F9CD, 8), (0x1F9E0, 7),
  (0x1F9E2, 9), (0x1F9E7, 10), (0x1FA70, 9), (0x1FA78, 10), (0x1FA80, 4),
  (0x1FA90, 10), (0x1FAB0, 6), (0x1FAB4, 2), (0x1FABB, 2), (0x1FABC, 6),
  (0x1FAC0, 7), (0x1FAC3, 8), (0x1FACE, 6), (0x1FAD0, 3), (0x1FAE0, 11),
  (0x1FAF0, 7),
)  # fmt: skip
_TONE_NAME = re.compile(
  r',? ?\b(medium-light|medium-dark|medium|light|dark) skin tone\b', re.I
)


@dataclasses.dataclass(frozen=True)
class Picture:
  """One drawing; -1 where a field does not apply.

  Attributes:
    number: position in `Glyphs`.
    key: code points in hexadecimal, joined by '-'.
    caption: lower case English name without the tone.
    base: what all variants share; the unit of `new_emoji`.
    family: the picture without its tone.
    tone: index into `TONES`; 0 is a default that has toned siblings.
    gender: index into `GENDERS`.
    hair: index into `HAIRS`, of single people.
    group: index into `GROUPS`.
    subgroup: see `label_sizes`.
  """

  number: int
  key: str
  caption: str
  base: Sequence
  family: Sequence
  tone: int
  gender: int
  hair: int
  group: int
  subgroup: int


@dataclasses.dataclass(frozen=True)
class Catalog:
  """Pictures by key, and per split the pictures and pairs of each kind.

  `pairs[split][kind]` holds (source, target); `pictures[split]` singles.
  Nothing of `new_edit`'s targets or of `new_emoji` is in 'train'.
  """

  pictures: dict[str, tuple[Picture, ...]]
  pairs: dict[str, dict[str, tuple[tuple[Picture, Picture], ...]]]


def label_sizes() -> dict[str, int]:
  """Number of classes of each entry of `Record.meta['labels']`."""
  return {
    'group': len(GROUPS),
    'subgroup': len(_RANGES),
    'tone': 6,
    'gender': len(GENDERS),
  }


def draw_hash(*parts: object) -> int:
  """A number in [0, 2**32) that depends on the text of `parts` only."""
  text = '/'.join(map(str, parts)).encode()
  return int.from_bytes(hashlib.sha256(text).digest()[:4], 'big')


def describe(key: Sequence) -> tuple[Sequence, Sequence, int, int, int]:
  """Takes a sequence apart.

  Returns:
    `(base, family, tone, gender, hair)`; tone is 0 without a modifier and -1
    for several different ones.
  """
  tones = {_TONES[c] for c in key if c in _TONES}
  tone = (tones.pop() if len(tones) == 1 else -1) if tones else 0
  family = tuple(c for c in key if c not in _TONES)
  people = [c for c in family if c in _PEOPLE]
  gender, hair = -1, -1
  base: list[int] = []
  for c in family:
    if c in _HAIR:
      hair = _HAIR[c]
    elif c in _SIGNS and len(family) > 1:
      gender = _SIGNS[c]
    elif c in _FORMS:
      same, gender = _FORMS[c]
      base.append(same)
    elif c in _PEOPLE:
      base.append(_PERSON)
      gender = _PEOPLE[c] if len(people) == 1 else gender
    elif c not in _FACING or len(family) == 1:
      base.append(c)
  if len(people) == 1 and family and family[0] in _PEOPLE:
    hair = 0 if len(family) == 1 else hair
  found = tuple(base)
  return _ALIAS.get(found, found), family, tone, gender, hair


@functools.lru_cache(maxsize=2)
def load_catalog(keys: tuple[Sequence, ...]) -> Catalog:
  """Sorts all drawings that have a name into splits, and pairs them."""
  pictures = _pictures(keys)
  toned = frozenset(p.base for p in pictures.values() if p.tone > 0)
  split_of = {p.key: _split(p, toned) for p in pictures.values()}
  members: dict[str, list[Picture]] = defaultdict(list)
  for picture in pictures.values():
    members[split_of[picture.key]].append(picture)
  pairs = {split: _no_pairs() for split in SPLITS}
  for kind, source, target in _all_pairs(pictures):
    here, there = split_of[source.key], split_of[target.key]
    # A held-out picture is never the source of another's edit.
    if (here, there) in (
      ('train', 'train'), ('train', 'new_edit'), ('new_emoji', 'new_emoji')
    ):  # fmt: skip
      pairs[there][kind].append((source, target))
  ordered = {
    split: {
      kind: tuple(sorted(found, key=lambda p: draw_hash(p[0].key, p[1].key)))
      for kind, found in kinds.items()
    }
    for split, kinds in pairs.items()
  }
  ordered['train_eval'] = ordered['train']
  singles = {
    split: tuple(sorted(found, key=lambda p: draw_hash(p.key)))
    for split, found in members.items()
  }
  singles['train_eval'] = singles['train']
  return Catalog(singles, ordered)


def _no_pairs() -> dict[str, list]:
  return {kind: [] for kind in PAIR_KINDS}


def _names() -> dict[Sequence, str]:
  emoji = require('emoji', 'data')
  return {
    tuple(c for c in map(ord, text) if c != 0xFE0F): (
      data['en'].strip(':').replace('_', ' ').lower()
    )
    for text, data in emoji.EMOJI_DATA.items()
  }


def _pictures(keys: tuple[Sequence, ...]) -> dict[Sequence, Picture]:
  names = _names()
  # Swatches of a tone alone are no pictures.
  known = [
    (i, key)
    for i, key in enumerate(keys)
    if key in names and key[0] not in _TONES
  ]
  toned = {describe(key)[1] for _, key in known if describe(key)[2] > 0}
  genders = defaultdict(set)
  for _, key in known:
    base, _, _, gender, _ = describe(key)
    genders[base].add(gender)
  starts = [start for start, _ in _RANGES]
  found = {}
  for number, key in known:
    base, family, tone, gender, hair = describe(key)
    if tone == 0 and family not in toned:
      tone = -1
    if gender == -1 and 2 in genders[base] and len(base) == 1:
      gender = 0
    subgroup = bisect.bisect_right(starts, key[0]) - 1
    # CLDR writes 'waving hand medium skin tone'.
    caption = _TONE_NAME.sub('', names[key]).replace(' skin tone', '')
    found[key] = Picture(
      number, '-'.join(f'{c:X}' for c in key), caption.strip(' ,:'), base,
      family, tone, gender, hair, _RANGES[subgroup][1], subgroup,
    )  # fmt: skip
  return found


def _split(picture: Picture, toned: frozenset[Sequence]) -> str:
  share = NEW_EMOJI_TONED if picture.base in toned else NEW_EMOJI_PLAIN
  if draw_hash('base', picture.base) % 100 < share:
    return 'new_emoji'
  # One tone for the whole base: the drawings of a person and of a man are
  # often the same, and those that face right are near mirror images.
  held = draw_hash('edit', picture.base)
  if picture.tone >= 0 and held % 100 < NEW_EDIT:
    return 'new_edit' if picture.tone == (held >> 8) % 6 else 'train'
  return 'train'


def _all_pairs(pictures: dict[Sequence, Picture]):
  """Yields `(kind, source, target)` of all pictures that differ in one way."""
  groups = defaultdict(list)
  for p in pictures.values():
    right = _RIGHT in p.family
    if p.tone >= 0:
      groups['tone', p.family].append(p)
    if p.gender >= 0:
      rest = (p.tone, p.hair, right, len(p.base), 0x1F471 in p.family)
      groups['gender', p.base, rest].append(p)
    if p.hair >= 0 and p.base == (_PERSON,):
      groups['hair', p.tone, p.gender].append(p)
  for (kind, *_), members in groups.items():
    for source in members:
      for target in members:
        if source is target or (
          kind != 'tone' and getattr(source, kind) == getattr(target, kind)
        ):
          continue
        yield kind, source, target
