"""Text to token ids: byte-level, or a SentencePiece T5 vocabulary.

In: an instruction or caption. Out: `(ids int32 [T], mask bool [T])`, where an
all-False mask is the null condition. Rules, the same for both: None, empty and
blank text are the null condition; text is normalised to NFC and its outer
white space dropped; other types, NUL and lone surrogates are a `RecordError`;
text longer than T keeps its end mark and is reported once with both lengths.
"""

import pathlib
import unicodedata
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Int32

from scar_jax.data.cleaning import clean_caption
from scar_jax.data.records import RecordError
from scar_jax.extras import require

PAD, EOS, UNKNOWN = 0, 1, 2
_BYTES = 3  # first byte id, after pad, end and unknown, as in ByT5
# Where the tokenizer of a T5 folder may lie, the first found is read.
_T5_FILES = ('spiece.model', 'sentencepiece.model', 'tokenizer.json')


def make_text(cfg: Any) -> 'Text':
  """The encoder that a `text` config section describes.

  Args:
    cfg: fields `kind` ('byte' or 't5'), `length`, for T5 `vocab` (file or
      folder); optional `pad` ('right' or 'left') and `clean`.

  Raises:
    ValueError: an unknown kind, or no vocabulary.
  """
  more = {
    'pad': getattr(cfg, 'pad', 'right'),
    'clean': getattr(cfg, 'clean', False),
  }
  if cfg.kind == 'byte':
    return ByteText(cfg.length, **more)
  if cfg.kind == 't5':
    return T5Text(cfg.vocab, cfg.length, **more)
  raise ValueError(f'text.kind={cfg.kind!r}; accepted: byte, t5')


def checked_text(text: Any, key: str = '') -> str:
  """The text as it is tokenized: NFC, outer white space dropped; '' is null.

  Raises:
    RecordError: not text, or text that no tokenizer can take.
  """
  if text is None:
    return ''
  if not isinstance(text, str):
    raise RecordError(
      key or 'text',
      f'the text must be a string, found {type(text).__name__} {text!r:.40}',
    )
  if text.isascii() and '\0' not in text:
    return text.strip()
  if '\0' in text:
    at = text.index('\0')
    raise RecordError(
      key or 'text', f'the text holds a NUL character at position {at}'
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise RecordError(
      key or 'text',
      f'the text holds half a surrogate pair at position {error.start}',
    ) from None
  return unicodedata.normalize('NFC', text).strip()


class Text:
  """What both tokenizers share; subclasses give `_tokens` and `vocab`.

  Attributes:
    length: T, the end mark included.
    vocab: ids lie below this.
    cut: how many texts were longer than T.
    unknown: how many texts had more unknown tokens than `max_unknown`.
  """

  vocab: int

  def __init__(
    self,
    length: int,
    pad: str = 'right',
    clean: bool = False,
    max_unknown: float = 0.2,
  ):
    if length < 2:
      raise ValueError(f'text.length={length}; accepted: 2 or more')
    if pad not in ('right', 'left'):
      raise ValueError(f'text.pad={pad!r}; accepted: right, left')
    self.length = length
    self.pad = pad
    self.clean = clean
    self.max_unknown = max_unknown
    self.cut = 0
    self.unknown = 0

  def encode(
    self, text: str | None, key: str = ''
  ) -> tuple[Int32[np.ndarray, ' T'], Bool[np.ndarray, ' T']]:
    """Token ids and which are real.

    Args:
      text: '' or None is the null condition.
      key: which record, for messages.

    Raises:
      RecordError: see `checked_text`.
    """
    ids = np.full(self.length, PAD, np.int32)
    mask = np.zeros(self.length, np.bool_)
    text = checked_text(text, key)
    if self.clean and text:
      # Twice, as LlamaGen does: the first pass uncovers what a second removes.
      text = clean_caption(clean_caption(text))
    if not text:
      return ids, mask
    tokens = self._tokens(text)
    self._report_unknown(tokens, text, key)
    room = self.length - 1
    if len(tokens) > room:
      self._report_cut(len(tokens) + 1, key)
      tokens = self._shorten(tokens, room)
    n = len(tokens) + 1
    start = 0 if self.pad == 'right' else self.length - n
    ids[start : start + n - 1] = tokens
    ids[start + n - 1] = EOS
    mask[start : start + n] = True
    return ids, mask

  def __call__(
    self, texts: list[str | None]
  ) -> tuple[Int32[np.ndarray, 'B T'], Bool[np.ndarray, 'B T']]:
    """A batch of texts."""
    rows = [self.encode(text) for text in texts]
    return np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])

  def _tokens(self, text: str) -> np.ndarray:
    raise NotImplementedError

  def _shorten(self, tokens: np.ndarray, room: int) -> np.ndarray:
    return tokens[:room]

  def _report_cut(self, found: int, key: str) -> None:
    self.cut += 1
    if self.cut == 1:
      logging.warning(
        '%s: text of %d tokens is cut to text.length=%d; further cuts are'
        ' counted, not reported',
        key or 'text',
        found,
        self.length,
      )

  def _report_unknown(self, tokens: np.ndarray, text: str, key: str) -> None:
    share = float(np.mean(tokens == UNKNOWN)) if len(tokens) else 0.0
    if share <= self.max_unknown:
      return
    self.unknown += 1
    if self.unknown == 1:
      logging.warning(
        '%s: %.0f%% of the tokens of %.40r are unknown to this vocabulary;'
        ' further such texts are counted, not reported',
        key or 'text',
        100 * share,
        text,
      )


class ByteText(Text):
  """UTF-8 bytes as ids 3 to 258 (ByT5's numbers); nothing is unknown."""

  vocab = 256 + _BYTES

  def _tokens(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + _BYTES

  def _shorten(self, tokens: np.ndarray, room: int) -> np.ndarray:
    # A cut inside a character would leave bytes that are no text.
    while room and 0x80 <= tokens[room] - _BYTES < 0xC0:
      room -= 1
    return tokens[:room]

  def decode(self, ids: Int32[np.ndarray, ' T']) -> str:
    """The text again, without special ids."""
    kept = ids[ids >= _BYTES] - _BYTES
    return kept.astype(np.uint8).tobytes().decode(errors='replace')


class T5Text(Text):
  """A T5 vocabulary from the user's files.

  Args:
    path: `spiece.model`, `tokenizer.json`, or the folder that holds one.
    length: see `Text`.
    **more: see `Text`.

  Raises:
    ValueError: no such file, or not a T5 vocabulary.
  """

  def __init__(self, path: str | pathlib.Path, length: int, **more: Any):
    super().__init__(length, **more)
    self._encode, self.vocab = _load_t5(path)

  def _tokens(self, text: str) -> np.ndarray:
    return np.asarray(self._encode(text), np.int32)


class _Pieces:
  """Picklable call on a SentencePiece model."""

  def __init__(self, path: str):
    sentencepiece = require('sentencepiece', 'text')
    self.model = sentencepiece.SentencePieceProcessor(model_file=path)

  def __call__(self, text: str) -> list[int]:
    return self.model.encode(text)


class _Fast:
  """Picklable call on a `tokenizer.json`."""

  def __init__(self, path: str):
    self.model = require('tokenizers', 'text').Tokenizer.from_file(path)

  def __call__(self, text: str) -> list[int]:
    return self.model.encode(text, add_special_tokens=False).ids


def find_vocab(path: str | pathlib.Path) -> pathlib.Path:
  """The file of a T5 vocabulary, itself or the one in a folder.

  Raises:
    ValueError: there is none.
  """
  given, path = path, pathlib.Path(path)
  if not str(given) or not path.exists():
    raise ValueError(
      f'text.vocab={str(given)!r} does not exist; accepted: one of'
      f' {", ".join(_T5_FILES)}, or its folder'
    )
  if path.is_dir():
    found = [path / name for name in _T5_FILES if (path / name).exists()]
    if not found:
      raise ValueError(
        f'text.vocab={str(given)!r} holds none of {", ".join(_T5_FILES)}'
      )
    path = found[0]
  return path


def _load_t5(path: str | pathlib.Path) -> tuple[Any, int]:
  path = find_vocab(path)
  try:
    if path.suffix == '.json':
      encode = _Fast(str(path))
      ids = [encode.model.token_to_id(t) for t in ('<pad>', '</s>', '<unk>')]
      vocab = encode.model.get_vocab_size()
    else:
      encode = _Pieces(str(path))
      model = encode.model
      ids = [model.pad_id(), model.eos_id(), model.unk_id()]
      vocab = model.get_piece_size()
  except ValueError:
    raise
  except Exception as error:
    raise ValueError(
      f'text.vocab={str(path)!r} cannot be read: {error}'
    ) from error
  if ids != [PAD, EOS, UNKNOWN]:
    raise ValueError(
      f'text.vocab={str(path)!r} has pad, end, unknown = {ids}; a T5'
      f' vocabulary has {[PAD, EOS, UNKNOWN]}'
    )
  return encode, vocab
