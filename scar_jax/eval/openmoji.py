"""Scores of tone edits: is the skin as asked, and the rest untouched?

In: what a model made, the sources, the truths and the tones asked, beside the
tokenizer's own reconstruction of the truths (the ceiling of any model that
decodes with it). Out: the numbers of `metrics.json`, see `score_edits`.
"""

import numpy as np
from jaxtyping import Bool, Int, UInt8

from scar_jax.data.sources.openmoji_glyphs import TONE_COLOURS

# A pixel has changed if one of its channels differs by more grey levels.
MIN_CHANGE = 16
# Hair changes with the tone in some drawings, and edges mix skin with lines:
# only pixels this near to the asked tone in the truth (RGB distance) are skin.
# The closest two tones are 61.8 apart.
MAX_SKIN_DISTANCE = 24.0
# What an exact picture scores; JSON has no infinity.
MAX_PSNR = 99.0

Images = UInt8[np.ndarray, 'B H W 3']


def changed(source: Images, truth: Images) -> Bool[np.ndarray, 'B H W']:
  """Where the truth differs from the source by more than `MIN_CHANGE`."""
  gap = np.abs(source.astype(np.int16) - truth.astype(np.int16))
  return gap.max(-1) > MIN_CHANGE


def skin(
  source: Images, truth: Images, tone: Int[np.ndarray, ' B']
) -> Bool[np.ndarray, 'B H W']:
  """The part of the changed region that is skin in the truth.

  A drawing too fine to have a pure pixel keeps its whole changed region.
  """
  region = changed(source, truth)
  gap = truth.astype(np.float32) - TONE_COLOURS[tone][:, None, None]
  pure = region & (np.linalg.norm(gap, axis=-1) < MAX_SKIN_DISTANCE)
  return np.where(pure.any((1, 2))[:, None, None], pure, region)


def nearest_tone(
  images: Images, region: Bool[np.ndarray, 'B H W']
) -> Int[np.ndarray, ' B']:
  """The tone nearest to each image's mean colour in its region (RGB).

  An empty region has no tone, -1.
  """
  count = region.sum((1, 2))
  total = (images * region[..., None]).sum((1, 2), dtype=np.float64)
  mean = total / np.maximum(count, 1)[:, None]
  gap = mean[:, None] - TONE_COLOURS[None].astype(np.float64)
  tone = np.linalg.norm(gap, axis=-1).argmin(1)
  return np.where(count > 0, tone, -1)


def masked_psnr(
  images: Images, truth: Images, region: Bool[np.ndarray, 'B H W']
) -> np.ndarray:
  """PSNR of each image within its region, dB, at most `MAX_PSNR`.

  An empty region has none, NaN.
  """
  gap = images.astype(np.float64) - truth.astype(np.float64)
  count = region.sum((1, 2)) * 3
  squared = ((gap**2) * region[..., None]).sum((1, 2, 3))
  with np.errstate(divide='ignore', invalid='ignore'):
    value = 10 * np.log10(255.0**2 * count / squared)
  return np.where(count > 0, np.minimum(value, MAX_PSNR), np.nan)


def score_edits(
  result: Images,
  source: Images,
  truth: Images,
  tone: Int[np.ndarray, ' B'],
  reconstruction: Images | None = None,
) -> dict[str, float | int]:
  """Tone accuracy and background fidelity of edits.

  Args:
    result: what the model made.
    source: the pictures it was given.
    truth: the pictures asked for.
    tone: the tone asked, index into `TONES`; rows below 0 are no tone edits
      and are left out.
    reconstruction: the tokenizer's decoding of `truth`; without it the two
      entries of the tokenizer are missing.

  Returns:
    `n`, edits scored (tone edits whose truth differs from the source at all);
    `tone_accuracy`, share of [0, 1] whose skin is nearest to the asked tone;
    `background_psnr`, mean over images of the PSNR outside the changed region
    against the truth, dB, each at most `MAX_PSNR`; the same with the prefix
    `tokenizer_` for the reconstruction.

  Raises:
    ValueError: shapes or types differ, or there is no tone edit.
  """
  arrays = {'result': result, 'source': source, 'truth': truth}
  if reconstruction is not None:
    arrays['reconstruction'] = reconstruction
  for name, array in arrays.items():
    if array.dtype != np.uint8 or array.shape != truth.shape:
      raise ValueError(
        f'{name} is {array.dtype} {array.shape}; accepted: uint8 '
        f'{truth.shape}, as truth (eval.openmoji.score_edits)'
      )
  tone = np.asarray(tone)
  if tone.shape != truth.shape[:1] or tone.max(initial=-1) > 5:
    raise ValueError(
      f'tone has shape {tone.shape} and values up to '
      f'{tone.max(initial=-1)}; accepted: [{len(truth)}], -1 to 5'
    )
  keep = (tone >= 0) & changed(source, truth).any((1, 2))
  if not keep.any():
    raise ValueError(
      f'none of {len(tone)} pictures is a tone edit; accepted: at least one '
      "(data.kind 'tone' has them)"
    )
  tone = tone[keep]
  arrays = {name: array[keep] for name, array in arrays.items()}
  source, truth = arrays['source'], arrays['truth']
  inside = skin(source, truth, tone)
  outside = ~changed(source, truth)
  scores: dict[str, float | int] = {'n': int(keep.sum())}
  for prefix, name in (('', 'result'), ('tokenizer_', 'reconstruction')):
    if name in arrays:
      found = nearest_tone(arrays[name], inside)
      psnr = masked_psnr(arrays[name], truth, outside)
      scores[f'{prefix}tone_accuracy'] = float(np.mean(found == tone))
      scores[f'{prefix}background_psnr'] = float(np.nanmean(psnr))
  return scores
