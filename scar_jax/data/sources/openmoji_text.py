"""Instructions for OpenMoji's edits, and the palette's colours by name.

In: what is asked. Out: a short English sentence, at most `MAX_BYTES` bytes,
one of several wordings; the first of each list is the one for evaluation.
"""

import numpy as np

MAX_BYTES = 30
TEMPLATES = {
  'tone': (
    '{} skin',
    'make the skin {}',
    '{} skin tone',
    'change to {} skin',
  ),
  'gender': (
    'make it a {}',
    'change to a {}',
    'turn into a {}',
    'show a {} instead',
  ),
  'hair': ('{}', 'make it: {}', 'change to {}', 'give them {}'),
  'recolor': (
    'make the {0} part {1}',
    '{0} to {1}',
    'change {0} to {1}',
    'recolor {0} as {1}',
    'turn everything {0} into {1}',
  ),
  'background': ('{} background', 'make the background {}', 'background: {}'),
  'flip': ('flip it', 'mirror it', 'flip left to right'),
  'gray': ('make it gray', 'remove the color', 'black and white'),
  'keep': ('keep it', 'change nothing'),
  'control': ('color: {}',),
}
HAIR_WORDS = ('default hair', 'red hair', 'curly hair', 'white hair', 'bald')
# Shades of each name, light to dark, as OpenMoji's palette has them.
SHADES = {
  'red': ((0xEA, 0x5A, 0x47), (0xD2, 0x2F, 0x27), (0x78, 0x1E, 0x32)),
  'orange': ((0xF4, 0xAA, 0x41), (0xE2, 0x70, 0x22)),
  'green': ((0xB1, 0xCC, 0x33), (0x5C, 0x9E, 0x31), (0x18, 0x66, 0x48)),
  'blue': ((0x92, 0xD3, 0xF5), (0x61, 0xB2, 0xE4), (0x1E, 0x50, 0xA0)),
  'purple': ((0xB3, 0x99, 0xC8), (0x89, 0x67, 0xAA)),
  'pink': ((0xFF, 0xA7, 0xC0), (0xE6, 0x7A, 0x94)),
  'gray': ((0xD0, 0xCF, 0xCE), (0x9B, 0x9B, 0x9A), (0x3F, 0x3F, 0x3F)),
  'yellow': ((0xFC, 0xEA, 0x2B), (0xF1, 0xB3, 0x1C)),
  'brown': ((0xA5, 0x79, 0x39), (0x6A, 0x46, 0x2F)),
}
# Colours that are never skin or hair: clothes and things may trade them.
HUES = ('red', 'orange', 'green', 'blue', 'purple', 'pink')


def write(
  kind: str, *words: str, rng: np.random.Generator | None = None
) -> str:
  """An instruction of `kind`; `rng` None is the first wording.

  Too long a text loses whole words at its end.
  """
  forms = TEMPLATES[kind]
  form = forms[0 if rng is None else int(rng.integers(len(forms)))]
  text = form.format(*words)
  if len(text.encode()) > MAX_BYTES:
    text = text.encode()[: MAX_BYTES + 1].decode(errors='ignore')
    text = text.rsplit(' ', 1)[0].rstrip(' ,:')
  return text


def shade_table(palette: np.ndarray) -> dict[str, tuple[tuple[int, int], ...]]:
  """Name -> (palette index, rank of the shade) of all its colours."""
  colours = [tuple(map(int, c)) for c in palette]
  return {
    name: tuple(
      (i, shades.index(c)) for i, c in enumerate(colours) if c in shades
    )
    for name, shades in SHADES.items()
  }


def shade(name: str, rank: int) -> tuple[int, int, int]:
  """RGB of the shade of `name` nearest to `rank`."""
  return SHADES[name][min(rank, len(SHADES[name]) - 1)]
