"""Optional caption cleaning for captions scraped from the web.

In and out: one string. Written after the list of steps in the description of
LlamaGen's text-to-image training (owner/name: FoundationVision/LlamaGen),
which cleans captions twice. Off by default: SCAR and EditAR do not clean.
"""

import html
import re
import urllib.parse

_DASHES = (
  '\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2e3a\u2e3b\ufe58\ufe63\uff0d'
)
_DOUBLE = '\u00ab\u00bb\u201c\u201d\u201e\u201f\u275d\u275e\u300c\u300d\u2033'
_SINGLE = '\u2018\u2019\u201a\u201b\u2032\u00b4`'
_UNIFY = str.maketrans(
  dict.fromkeys(_DASHES, '-')
  | dict.fromkeys(_DOUBLE, '"')
  | dict.fromkeys(_SINGLE, "'")
)
# Strokes and radicals, kana, enclosed, compatibility, ideographs.
_CJK = re.compile(
  '[\u2e80-\u2fff\u3000-\u30ff\u3100-\u33ff\u3400-\u9fff\uf900-\ufaff]+'
)
_FILE = r'\S+\.(?:jpe?g|png|gif|bmp|webp|svg|tiff?|pdf|mp[34]|zip|html?|php)\b'
# Each is replaced by a space, in this order.
_DROP = tuple(
  re.compile(pattern, re.IGNORECASE)
  for pattern in (
    r'\b(?:https?|ftp)\S*://\S+|\bwww\.\S+',
    r'\b[\w-]+\.(?:com|co|ru|net|org|edu|gov|io|info|shop)(?:/\S*)?(?!\w)',
    r'<[^<>]*>',
    r'@[\w.]+',
    r'\b\d{1,3}(?:\.\d{1,3}){3}\b',
    r'\bid[:_ -]?\d+\b',
    r'#\d+\b|\b\d{5,}\b',
    _FILE,
    r'\b(?:worldwide |free |fast )*shipping\b|\b(?:free )?downloads?\b',
    r'\bclick\b(?: (?:here|for|on)\b[^.,;]*)?',
    r'\b\d+\s*[x\u00d7]\s*\d+\b',
    # Article numbers: letters and digits mixed, at least seven long.
    r'\b(?=\w*\d\w*\d)(?=\w*[a-z])[a-z0-9]{7,}\b',
    r'[#*|~^_=\[\]{}<>\\/\u00a9\u00ae\u2122\u2022]{1,}',
  )
)


def clean_caption(text: str) -> str:
  """One pass over a caption; see the module text."""
  text = urllib.parse.unquote_plus(text) if '%' in text else text
  text = _fix(text).lower().strip()
  text = html.unescape(html.unescape(text))
  text = _CJK.sub(' ', text).translate(_UNIFY)
  if len(re.findall(r'\w[-_]\w', text)) > 3:
    text = re.sub(r'[-_]', ' ', text)
  for pattern in _DROP:
    text = pattern.sub(' ', text)
  text = re.sub(r'"{2,}', '"', text)
  text = re.sub(r"'{2,}", "'", text)
  text = re.sub(r'\.{2,}', '. ', text)
  text = re.sub(r'\s*:\s+', ': ', text)
  text = re.sub(r'\s+', ' ', text)
  return text.strip(' \'"-_.,:;+&')


def _fix(text: str) -> str:
  """Repairs wrongly decoded text where the library is at hand."""
  try:
    import ftfy
  except ImportError:
    return text
  return ftfy.fix_text(text)
