"""CLIP similarity of pictures and texts: `100 max(cos, 0)`.

In: uint8 pictures, texts, a CLIP artifact of both towers, and its tokenizer.
Out: a score for each pair. Called by `pie.py`. Source: torchmetrics' CLIPScore
with Hugging Face's preprocessing (shorter side to 224 by antialiased bicubic,
centre crop), method 10.4.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from scar_jax.artifacts import load_artifact
from scar_jax.extras import require
from scar_jax.models.encoders.clip import CLIP, clip_score
from scar_jax.models.encoders.semantic import NORMALIZE
from scar_jax.types import PyTree

_FILE = 'tokenizer.json'


def prepare(
  picture: UInt8[np.ndarray, 'H W 3'], side: int
) -> Float32[np.ndarray, 'side side 3']:
  """A picture as CLIP's vision tower takes it."""
  height, width = picture.shape[:2]
  # Whole numbers as Hugging Face cuts them.
  short, long = min(height, width), max(height, width)
  other = int(side * long / short)
  size = (side, other) if height <= width else (other, side)
  image = Image.fromarray(picture).resize(
    (size[1], size[0]), Image.Resampling.BICUBIC
  )
  top, left = (size[0] - side) // 2, (size[1] - side) // 2
  pixels = np.asarray(image)[top : top + side, left : left + side]
  mean, std = (np.asarray(x, np.float32) for x in NORMALIZE['clip'])
  return (pixels.astype(np.float32) / 255 - mean) / std


class ClipText:
  """CLIP's byte-pair tokens.

  Args:
    path: Hugging Face's `tokenizer.json`, or the folder that holds it.
    length: positions of the text tower.

  Raises:
    ValueError: no such file, or no CLIP vocabulary.
  """

  def __init__(self, path: str, length: int = 77):
    file = pathlib.Path(path)
    file = file / _FILE if file.is_dir() else file
    if not path or not file.is_file():
      raise ValueError(
        f'--clip_vocab={path!r}: no such file; accepted: the {_FILE} of a CLIP '
        'model, or its folder'
      )
    self._model: Any = require('tokenizers', 'text').Tokenizer.from_file(
      str(file)
    )
    ends = [
      self._model.token_to_id(f'<|{name}|>')
      for name in ('startoftext', 'endoftext')
    ]
    if None in ends:
      raise ValueError(
        f'--clip_vocab={path!r} has no <|startoftext|> and <|endoftext|>; '
        "accepted: CLIP's vocabulary"
      )
    self._start, self._end = ends
    self._length = length

  def __call__(self, text: str) -> Int32[np.ndarray, ' T']:
    """Ids, filled up with the end mark; a long text keeps its end mark."""
    ids = self._model.encode(text, add_special_tokens=False).ids
    ids = [self._start, *ids[: self._length - 2], self._end]
    fill = [self._end] * (self._length - len(ids))
    return np.asarray(ids + fill, np.int32)


class ClipSimilarity:
  """Scores by one network.

  Args:
    artifact: of `scar convert clip --part=both`.
    vocab: see `ClipText`.

  Raises:
    ValueError: an artifact without both towers, or no vocabulary.
  """

  def __init__(self, artifact: str, vocab: str):
    part = load_artifact(artifact, kind='clip')
    network: Any = CLIP(part.config)
    self._params: PyTree = part.params
    self._text = ClipText(vocab, part.config.text.length)
    vision = part.config.vision
    self._side = vision.patch * vision.table

    @jax.jit
    def score(params: PyTree, images: jax.Array, ids: jax.Array) -> jax.Array:
      variables = {'params': params}
      a = network.apply(variables, images, method='embed_images')
      b = network.apply(variables, ids, method='embed_text')
      return clip_score(a, b)

    self._score = score

  def __call__(self, pictures: list[np.ndarray], text: str) -> list[float]:
    """Score of each picture with one text."""
    images = np.stack([prepare(p, self._side) for p in pictures])
    ids = np.stack([self._text(text)] * len(pictures))
    scores = self._score(self._params, jnp.asarray(images), jnp.asarray(ids))
    return [float(s) for s in scores]
