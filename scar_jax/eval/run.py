"""What scores of the embedded sources are taken on, and measured against.

In: the name of a source; a tokenizer. Out: its held-out splits, and pictures
after the tokenizer: the ceiling of any model that decodes with it. Called by
`suites/embedded.py`, `bench/trained.py`.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from scar_jax import compiler
from scar_jax.data.geometry import to_float
from scar_jax.data.transforms import to_uint8
from scar_jax.models.tokenizers.make import make_tokenizer
from scar_jax.types import PyTree

# What is held out of each source, by name of the source.
HELD_OUT = {'openmoji': ('new_edit', 'new_emoji'), 'scenes': ('held_out',)}


class Reconstructor:
  """A tokenizer as the ceiling of what a model can draw.

  Args:
    cfg: of the tokenizer.
    params: of the tokenizer.
    batch: pictures at a time.
  """

  def __init__(self, cfg: Any, params: PyTree, batch: int = 16):
    model = make_tokenizer(cfg)

    @functools.partial(jax.jit, compiler_options=compiler.options())
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
