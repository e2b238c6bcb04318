"""The dimension legend, array aliases and the batch that every module shares.

Letters in shapes mean the same thing everywhere:

  B batch            L whole sequence        P prefix (semantic tokens)
  T text positions   N target tokens         R sets (steps of a sampler)
  D model width      H heads                 K head dimension
  F MLP width        V codebook size         C channels
  S keys, the cache included                 h, w token or patch grid

Images are `[B, H, W, C]`, float32 in [-1, 1]; only in image shapes does `H`
mean height.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
PyTree: TypeAlias = Any

# What a training step receives, a plain dict so that jit sees a stable tree.
# Keys that a recipe does not need are absent, never None:
#   target     float32 [B, H, W, 3]   image to produce
#   condition  float32 [B, H, W, 3]   source image or control map
#   text       int32   [B, T]         token ids, 0 is padding
#   text_mask  bool    [B, T]         True at real tokens; an all-False row is
#                                     the null text condition
#   label      int32   [B]            class id
#   valid      bool    [B]            False rows carry no loss (padding)
#   index      int32   [B]            position of the record in its source
# From a cache (`data.source=cache`), where they take the place of pictures and
# text ids, as far as they were stored:
#   tokens           int32  [B, N]        of the target
#   source_tokens    int32  [B, h, w]     of the condition image
#   features         float  [B, h, w, d]  of the condition image
#   target_features  float  [B, h, w, d]  of the target
#   text_features    float  [B, T, F]     of the frozen T5
Batch: TypeAlias = Mapping[str, Array]
