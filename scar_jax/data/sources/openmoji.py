"""OpenMoji as a source: edits, colouring of line art, and single pictures.

In: a split and a mixture of kinds of record. Out: `Record`s at the wanted
size. With a generator every load draws a kind, a pair, a wording and one
placement for both pictures; without, record `i` is fixed, centred on white and
worded plainly, for evaluation. Drawings: OpenMoji, CC BY-SA 4.0.
"""

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from scar_jax.config_values import nearest
from scar_jax.data.records import Record
from scar_jax.data.sources import openmoji_glyphs as glyphs
from scar_jax.data.sources import openmoji_pairs as pairs
from scar_jax.data.sources import openmoji_text as text
from scar_jax.data.sources.openmoji_pairs import Picture
from scar_jax.extras import require

cv2 = require('cv2', 'data')

# Share of each kind of record in training, by the name of the mixture.
MIXTURES = {
  'edit': {
    'tone': 0.7, 'gender': 0.04, 'hair': 0.02, 'recolor': 0.14,
    'background': 0.03, 'flip': 0.03, 'gray': 0.02, 'keep': 0.02,
  },
  'control': {'control': 1.0},
  'image': {'image': 1.0},
}  # fmt: skip
MIXTURES['both'] = {
  **{kind: 0.85 * share for kind, share in MIXTURES['edit'].items()},
  'control': 0.15,
}
KINDS = (*MIXTURES['edit'], 'control', 'image')
EVAL_LIMIT = 200  # records of each kind in the splits for evaluation
_OVERSAMPLE = 4  # samples along each side of a pixel
_LINES = np.repeat(255 - np.arange(256, dtype=np.uint8)[:, None], 3, 1)
_MARGIN = 0.94  # share of the picture that the drawing fills when centred


@dataclasses.dataclass(frozen=True)
class OpenmojiConfig:
  split: str = 'train'  # one of openmoji_pairs.SPLITS
  kind: str = 'edit'  # a name in MIXTURES, one of KINDS, or 'a=0.7,b=0.3'
  image_size: int = 32  # pixels, square
  augment: bool = True  # placement, mirroring and recolouring in training
  path: str = ''  # folder of the cache; '' is the user's
  limit: int = EVAL_LIMIT  # records of each kind outside 'train'; 0 is all


def make(data_cfg: Any, split: str) -> 'Openmoji':
  """The source that the `data` section of a config asks for."""
  return Openmoji(
    OpenmojiConfig(
      split=split,
      kind=data_cfg.kind,
      image_size=data_cfg.image_size,
      augment=data_cfg.augment,
      path=data_cfg.path,
    )
  )


def mixture(kind: str) -> dict[str, float]:
  """Share of each kind of record, from `OpenmojiConfig.kind`.

  Raises:
    ValueError: a name that is none, or a share that is not positive.
  """
  if kind in MIXTURES:
    return MIXTURES[kind]
  shares = {}
  for part in kind.split(','):
    name, _, share = part.strip().partition('=')
    if name not in KINDS:
      raise ValueError(
        f'data.kind={kind!r} names {name!r}; accepted: '
        f'{", ".join((*MIXTURES, *KINDS))}, or shares such as '
        f"'tone=0.7,control=0.3'.{nearest(name, (*MIXTURES, *KINDS))}"
      )
    try:
      shares[name] = float(share or 1)
    except ValueError:
      shares[name] = 0.0
    if not 0 < shares[name] < float('inf'):
      raise ValueError(
        f'data.kind={kind!r} gives {name} the share {share!r}; accepted: '
        'a number above 0'
      )
  return shares


class Openmoji:
  """The source; picklable, since workers reopen the cached drawings."""

  def __init__(self, cfg: OpenmojiConfig):
    if cfg.split not in pairs.SPLITS:
      raise ValueError(
        f'data.split={cfg.split!r} is unknown; accepted: '
        f'{", ".join(pairs.SPLITS)}.{nearest(cfg.split, pairs.SPLITS)}'
      )
    self.cfg = cfg
    self.shares = mixture(cfg.kind)
    self._open()

  def __getstate__(self):
    return self.cfg

  def __setstate__(self, cfg):
    self.__init__(cfg)

  def _open(self) -> None:
    cfg = self.cfg
    self.glyphs = glyphs.load_glyphs(cfg.image_size, cfg.path)
    catalog = pairs.load_catalog(self.glyphs.keys)
    self._boxes: dict[int, tuple[int, int, int, int]] = {}
    self._shades = text.shade_table(self.glyphs.palette)
    singles = catalog.pictures[cfg.split]
    found = {}
    for kind in self.shares:
      if kind in pairs.PAIR_KINDS:
        found[kind] = self._visible(catalog.pairs[cfg.split][kind])
      elif kind == 'image':
        found[kind] = tuple((p, p) for p in singles)
      elif kind == 'control':
        # The colours of a flag are not in its name.
        flag = pairs.GROUPS.index('flag')
        found[kind] = tuple((p, p) for p in singles if p.group != flag)
      elif cfg.split != 'new_edit':
        # Free edits start from a picture itself, which must be a known one.
        found[kind] = tuple((p, p) for p in singles)
    # Evaluation takes one kind of edit, unless its kinds are spelt out.
    if cfg.split != 'train':
      limits = dict.fromkeys(found, cfg.limit)
      if cfg.kind in ('edit', 'both'):
        found = {k: v for k, v in found.items() if k in ('tone', 'control')}
        # Only tones are scored; of colouring, a grid shows some.
        limits['control'] = -(-cfg.limit // 4)
      found = {k: v[: limits[k] or None] for k, v in found.items()}
    self.items = [(k, *pair) for k, some in found.items() for pair in some]
    if not self.items:
      raise ValueError(
        f'data.split={cfg.split!r} has no record of data.kind={cfg.kind!r}; '
        "accepted there: 'tone', 'control' and 'image'"
      )
    self._kinds = [k for k, some in found.items() if some]
    weights = np.array([self.shares[k] for k in self._kinds])
    self._cumulative = np.cumsum(weights / weights.sum())
    # Bases first: a person has 18 variants, a hand six, an apple one.
    self._by_base = {}
    for kind in self._kinds:
      grouped = defaultdict(list)
      for pair in found[kind]:
        grouped[pair[0].base].append(pair)
      self._by_base[kind] = list(grouped.values())

  def _visible(self, some):
    """Drops pairs whose two drawings are the same (many men and persons)."""
    small = self.glyphs.index[:, 1::4, 1::4]
    return tuple(
      (a, b)
      for a, b in some
      if (small[a.number] != small[b.number]).mean() > 0.002
    )

  def __len__(self) -> int:
    return len(self.items)

  def describe(self) -> str:
    counts = defaultdict(int)
    for kind, *_ in self.items:
      counts[kind] += 1
    listed = ', '.join(f'{n} {kind}' for kind, n in counts.items())
    return (
      f'OpenMoji (CC BY-SA 4.0), split {self.cfg.split}: {listed}; '
      f'{self.cfg.image_size} px'
    )

  def load(self, i: int, rng: np.random.Generator | None) -> Record:
    """See `records.Source`; `meta` has kind, tone (asked, -1 if none), keys."""
    if rng is None:
      kind, source, target = self.items[i]
      # Free edits draw their colours also here, from the number alone.
      return self._make(kind, source, target, None, np.random.default_rng(i))
    if self.cfg.split != 'train':
      kind, source, target = self.items[i]
    else:
      place = int(np.searchsorted(self._cumulative, rng.random()))
      kind = self._kinds[min(place, len(self._kinds) - 1)]
      some = self._by_base[kind]
      group = some[int(rng.integers(len(some)))]
      source, target = group[int(rng.integers(len(group)))]
    return self._make(kind, source, target, rng, rng)

  def _make(
    self,
    kind: str,
    source: Picture,
    target: Picture,
    wording: np.random.Generator | None,
    rng: np.random.Generator,
  ) -> Record:
    before = np.asarray(self.glyphs.index[source.number])
    after = before
    if source is not target:
      after = np.asarray(self.glyphs.index[target.number])
    colours = self.glyphs.palette.copy()
    augment = wording is not None and self.cfg.augment
    if augment:
      self._vary(colours, rng, hues=kind != 'control')
    new = colours
    words: tuple[str, ...] = ()
    flip = kind == 'flip'
    if kind == 'tone':
      words = (glyphs.TONES[target.tone],)
    elif kind == 'gender':
      words = (pairs.GENDERS[target.gender],)
    elif kind == 'hair':
      words = (text.HAIR_WORDS[target.hair],)
    elif kind == 'recolor':
      new, words = self._recolor(colours, before, target, rng)
      kind = 'recolor' if words else 'keep'
    elif kind == 'background':
      name = text.HUES[int(rng.integers(len(text.HUES)))]
      new = colours.copy()
      new[glyphs.EMPTY] = text.shade(name, 0)
      words = (name,)
    elif kind == 'gray':
      new = np.repeat(colours @ np.array([0.299, 0.587, 0.114]), 3)
      new = np.rint(new).astype(np.uint8).reshape(-1, 3)
    elif kind == 'control':
      tone = f', {glyphs.TONES[target.tone]} skin' if target.tone > 0 else ''
      words = (target.caption[: 32 - len(tone)].strip() + tone,)
    matrix = self._placement(source, target, rng if augment else None)
    here = self._warp(before, matrix)
    there = here if before is after else self._warp(after, matrix)
    result = self._paint(there, new)
    if flip:
      result = np.ascontiguousarray(result[:, ::-1])
    if kind == 'image':
      condition, instruction = None, ''
    else:
      if kind == 'control':
        drawn = self._warp(glyphs.line_art(before), matrix, 0)
        condition = self._paint(drawn, _LINES)
      else:
        condition = self._paint(here, colours)
      instruction = text.write(kind, *words, rng=wording)
    return Record(
      target=result,
      condition=condition,
      text=instruction,
      key=f'openmoji/{kind}/{source.key}/{target.key}',
      meta={
        'kind': kind,
        'tone': target.tone if kind == 'tone' else -1,
        'source_tone': source.tone,
        'caption': target.caption,
        'keys': (source.key, target.key),
        'labels': {
          'group': target.group,
          'subgroup': target.subgroup,
          'tone': target.tone,
          'gender': target.gender,
        },
      },
    )

  def _vary(
    self, colours: np.ndarray, rng: np.random.Generator, hues: bool
  ) -> None:
    """Trades colours that are no skin or hair, and paints the background.

    Skin keeps its colour, so no held-out tone of a drawing can come about.
    """
    if hues and rng.random() < 0.6:
      order = rng.permutation(len(text.HUES))
      for name, other in zip(text.HUES, order, strict=True):
        for i, rank in self._shades[name]:
          colours[i] = text.shade(text.HUES[other], rank)
    if hues and rng.random() < 0.4:
      colours[glyphs.EMPTY] = rng.integers(96, 256, 3)

  def _recolor(
    self,
    colours: np.ndarray,
    index: UInt8[np.ndarray, 'S S'],
    picture: Picture,
    rng: np.random.Generator,
  ) -> tuple[np.ndarray, tuple[str, ...]]:
    """Another palette and the words for it; no words if nothing has a name."""
    counts = np.bincount(index[::2, ::2].ravel(), minlength=256)
    ranks = {  # what the picture shows now, hues having been traded
      tuple(shade): (name, rank)
      for name, shades in text.SHADES.items()
      for rank, shade in enumerate(shades)
    }
    shown = defaultdict(list)
    for i in np.flatnonzero(counts[: glyphs.EMPTY]):
      found = ranks.get(tuple(map(int, colours[i])))
      if found:
        shown[found[0]].append((i, found[1], counts[i]))
    names = [n for n, v in shown.items() if sum(c for *_, c in v) > 40]
    if not names:
      return colours, ()
    source = names[int(rng.integers(len(names)))]
    # Yellow and brown are skin: they might paint a held-out variant.
    wanted = [n for n in text.HUES if n != source]
    if picture.tone < 0:
      wanted += [n for n in ('yellow', 'brown', 'gray') if n != source]
    target = wanted[int(rng.integers(len(wanted)))]
    new = colours.copy()
    for i, rank, _ in shown[source]:
      new[i] = text.shade(target, rank)
    return new, (source, target)

  def _placement(
    self, source: Picture, target: Picture, rng: np.random.Generator | None
  ) -> Float[np.ndarray, '2 3']:
    """Affine map from a drawing to the unit square, shared by the pair."""
    size = self.glyphs.index.shape[1]
    top, bottom, left, right = self._box(source.number)
    if source is not target:
      box = self._box(target.number)
      top, bottom = min(top, box[0]), max(bottom, box[1])
      left, right = min(left, box[2]), max(right, box[3])
    span = max(bottom - top, right - left, size // 3)
    fit, shift, angle, mirror = _MARGIN / span, np.zeros(2), 0.0, 1.0
    if rng is not None:
      share = rng.uniform(0.65, 1.04)
      fit *= share
      room = max(0.0, 1.0 - share) / 2
      shift = rng.uniform(-room - 0.02, room + 0.02, 2)
      if rng.random() < 0.3:
        angle = np.deg2rad(rng.uniform(-12, 12))
      named = any(w in target.caption for w in ('left', 'right', 'clock'))
      if rng.random() < 0.5 and not named:
        mirror = -1.0
    cos, sin = fit * np.cos(angle), fit * np.sin(angle)
    linear = np.array([[cos * mirror, -sin], [sin * mirror, cos]])
    middle = np.array([(left + right) / 2, (top + bottom) / 2])
    return np.column_stack([linear, 0.5 + shift - linear @ middle])

  def _box(self, number: int) -> tuple[int, int, int, int]:
    """First and last + 1 row and column that are not empty, kept."""
    if number not in self._boxes:
      filled = np.asarray(self.glyphs.index[number]) != glyphs.EMPTY
      rows = np.flatnonzero(filled.any(1))
      columns = np.flatnonzero(filled.any(0))
      size = len(filled)
      self._boxes[number] = (
        (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        if len(rows)
        else (0, size, 0, size)
      )
    return self._boxes[number]

  def _warp(
    self,
    index: UInt8[np.ndarray, 'S S'],
    matrix: Float[np.ndarray, '2 3'],
    empty: int = glyphs.EMPTY,
  ) -> UInt8[np.ndarray, 'L L']:
    """The drawing placed, still indices, `_OVERSAMPLE` times too large."""
    large = self.cfg.image_size * _OVERSAMPLE
    scaled = matrix * large
    # Pixel centres lie at half-integers of both squares.
    scaled[:, 2] += scaled[:, :2] @ (0.5, 0.5) - 0.5
    return cv2.warpAffine(
      index, scaled, (large, large), flags=cv2.INTER_NEAREST,
      borderMode=cv2.BORDER_CONSTANT, borderValue=empty,
    )  # fmt: skip

  def _paint(
    self, index: UInt8[np.ndarray, 'L L'], colours: UInt8[np.ndarray, '256 3']
  ) -> UInt8[np.ndarray, 'H H 3']:
    """Looks colours up and averages areas: that is the anti-aliasing."""
    planes = [cv2.LUT(index, np.ascontiguousarray(c)) for c in colours.T]
    size = self.cfg.image_size
    return cv2.resize(
      cv2.merge(planes), (size, size), interpolation=cv2.INTER_AREA
    )
