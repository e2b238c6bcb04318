"""Scores of a trained model on held-out records, for the embedded sources.

In: an editor, its tokenizer, a source. Out: the numbers of `score_edits` or
`score_scenes` for a split, and the pictures behind them. Called by `scar eval`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from scar_jax.data.geometry import letterbox, to_float
from scar_jax.data.records import Record, RecordError, Source
from scar_jax.data.transforms import to_uint8
from scar_jax.eval.openmoji import masked_psnr, score_edits
from scar_jax.eval.scenes import score_scenes
from scar_jax.models.tokenizers.make import make_tokenizer
from scar_jax.types import PyTree

# What is held out of each source, by name of the source.
HELD_OUT = {'openmoji': ('new_edit', 'new_emoji'), 'scenes': ('held_out',)}


@dataclasses.dataclass
class Split:
  """A scored split.

  Attributes:
    scores: measure -> number.
    records: in order.
    result: what the model made.
    source: condition pictures.
    truth: targets.
    reconstruction: targets after the tokenizer.
  """

  scores: dict[str, Any]
  records: list[Record]
  result: UInt8[np.ndarray, 'n H W 3']
  source: UInt8[np.ndarray, 'n H W 3']
  truth: UInt8[np.ndarray, 'n H W 3']
  reconstruction: UInt8[np.ndarray, 'n H W 3']


class Reconstructor:
  """A tokenizer as the ceiling of what a model can draw.

  Args:
    cfg: of the tokenizer.
    params: of the tokenizer.
    batch: pictures at a time.
  """

  def __init__(self, cfg: Any, params: PyTree, batch: int = 16):
    model = make_tokenizer(cfg)

    @jax.jit
    def run(params: PyTree, images: jax.Array) -> jax.Array:
      variables = {'params': params}
      ids = model.apply(variables, images, method='encode')[0]
      return model.apply(variables, ids, method='decode_tokens')

    self._run, self._params, self._batch = run, params, batch

  def __call__(
    self, images: UInt8[np.ndarray, 'n H W 3']
  ) -> UInt8[np.ndarray, 'n H W 3']:
    """Encodes and decodes."""
    done = []
    for start in range(0, len(images), self._batch):
      some = images[start : start + self._batch]
      # One shape, one compilation: the last batch is filled up.
      fill = np.repeat(some[-1:], self._batch - len(some), axis=0)
      full = to_float(np.concatenate([some, fill]))
      done.append(to_uint8(self._run(self._params, full))[: len(some)])
    return np.concatenate(done)


def evaluate(
  editor: Any,
  tokenizer: Reconstructor,
  source: Source,
  name: str,
  limit: int = 0,
  seed: int = 0,
  **settings: Any,
) -> Split:
  """Makes and scores every record of a split.

  Args:
    editor: the model.
    tokenizer: its ceiling.
    source: records of the split.
    name: of the source, which decides the measures.
    limit: records; 0 is all.
    seed: of the first record.
    **settings: of the sampler.

  Raises:
    ValueError: no usable record.
  """
  size = (editor.cfg.image_size,) * 2
  records = []
  for i in range(min(len(source), limit or len(source))):
    try:
      record = source.load(i, None)
    except RecordError:
      continue
    pictures: dict[str, Any] = {'target': letterbox(record.target, size)[0]}
    if record.condition is not None:
      pictures['condition'] = letterbox(record.condition, size)[0]
    elif record.draw is not None:
      pictures['condition'] = record.draw(pictures['target'])
    records.append(dataclasses.replace(record, **pictures))
  if not records:
    raise ValueError(f'{source.describe()}: no usable record to score')
  truth = np.stack([r.target for r in records])
  given = [r.condition for r in records]
  blank = np.full_like(truth[0], 255)
  shown = np.stack([blank if g is None else g for g in given])
  classes = [r.label for r in records]
  made = editor(
    None if any(g is None for g in given) else given,
    [r.text for r in records],
    labels=None if any(c is None for c in classes) else classes,
    seed=[seed + i for i in range(len(records))],
    **settings,
  )
  result = np.stack([np.asarray(image.convert('RGB')) for image in made])
  again = tokenizer(truth)
  scores = _score(name, records, result, shown, truth, again)
  return Split(scores, records, result, shown, truth, again)


def _score(
  name: str,
  records: list[Record],
  result: np.ndarray,
  source: np.ndarray,
  truth: np.ndarray,
  again: np.ndarray,
) -> dict[str, Any]:
  """Measures by source; PSNR of the whole picture for all of them."""
  whole = np.ones(truth.shape[:3], bool)
  scores: dict[str, Any] = {'n': len(records)}
  if name == 'scenes' and all('kind' in r.meta for r in records):
    scores |= score_scenes(result, records, again)
  elif name == 'openmoji':
    tone = np.array([r.meta.get('tone', -1) for r in records])
    if (tone >= 0).any():
      scores |= score_edits(result, source, truth, tone, again)
    rows = np.array([r.meta.get('kind') == 'control' for r in records])
    if rows.any():
      psnr = masked_psnr(result[rows], truth[rows], whole[rows])
      ceiling = masked_psnr(again[rows], truth[rows], whole[rows])
      scores['control'] = {
        'n': int(rows.sum()),
        'psnr': float(psnr.mean()),
        'tokenizer_psnr': float(ceiling.mean()),
      }
  scores['psnr'] = float(masked_psnr(result, truth, whole).mean())
  scores['tokenizer_psnr'] = float(masked_psnr(again, truth, whole).mean())
  return scores
