"""What `Editor` returns: pictures at the size of their requests.

In: uint8 pictures of the model's canvas. Out: Pillow images or arrays; for
streaming, pictures whose missing parts show what lies below. Called by
`editor.py`.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from scar_jax.data.geometry import Box, letterbox_box, unletterbox
from scar_jax.data.masks import composite

OUTPUTS = ('pil', 'array')
_GREY = 127  # pixels that are not drawn yet, without a picture below them


class Growth(NamedTuple):
  """Pictures on their way.

  Attributes:
    done: tokens drawn.
    total: tokens of a picture.
    images: as they look now, one for each request.
  """

  done: int
  total: int
  images: list[Any]


def check_call(output: str, num_images: int) -> None:
  """Refuses what no call can return.

  Raises:
    ValueError: names what is accepted.
  """
  if output not in OUTPUTS:
    raise ValueError(f'output={output!r}; accepted: {", ".join(OUTPUTS)}')
  if num_images < 1:
    raise ValueError(f'num_images={num_images}; accepted: 1 or more')


def as_output(
  output: str, image: UInt8[np.ndarray, 'H W 3']
) -> Image.Image | np.ndarray:
  """A Pillow image for 'pil', the array itself for 'array'."""
  return Image.fromarray(image) if output == 'pil' else image


def framed(
  image: UInt8[np.ndarray, 'h w 3'],
  source: UInt8[np.ndarray, 'H W 3'] | None,
  box: Box | None,
  mask: Bool[np.ndarray, 'H W'] | None,
) -> UInt8[np.ndarray, 'H W 3']:
  """A result at the size of its request.

  Args:
    image: on the canvas.
    source: condition picture, None without one.
    box: that the request fills on it; None is that of `source`.
    mask: where it is drawn anew; elsewhere it is `source` exactly.
  """
  if box is None and source is not None:
    box = letterbox_box(source.shape[:2], image.shape[:2])
  if box is not None:
    image = unletterbox(image, box)
  if mask is not None and source is not None:
    image = composite(image, source, mask)
  return image


def covered(
  images: UInt8[np.ndarray, 'B H W 3'],
  done: Bool[np.ndarray, 'B h w'],
  below: Float[np.ndarray, 'B H W 3'] | None,
) -> UInt8[np.ndarray, 'B H W 3']:
  """Pictures where tokens are drawn, and what lies below elsewhere.

  Args:
    images: of all tokens, drawn or not.
    done: tokens that are drawn.
    below: condition pictures in [-1, 1]; None is grey.
  """
  side = images.shape[1] // done.shape[1], images.shape[2] // done.shape[2]
  drawn = done.repeat(side[0], axis=1).repeat(side[1], axis=2)[..., None]
  rest = np.full_like(images, _GREY)
  if below is not None:
    rest = np.rint((below + 1) * 127.5).astype(np.uint8)
  return np.where(drawn, images, rest)
