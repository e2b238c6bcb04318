"""What a stranger may send to the demo, and what the browser may ask for.

In: files that were uploaded, requests to the server. Out: decoded pictures, or
an error that says what is accepted; answers with headers that keep the page on
its own server. Called by `demo/page.py`.
"""

import dataclasses
import pathlib
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from scar_jax.data.transforms import decode

_FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF')
# The page loads nothing from elsewhere, and nothing elsewhere frames it.
_POLICY = (
  "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
  "connect-src 'self' data: blob:; frame-ancestors 'self'"
)
_HEADERS = (
  (b'content-security-policy', _POLICY.encode()),
  (b'x-content-type-options', b'nosniff'),
  (b'referrer-policy', b'no-referrer'),
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of one visitor's request, and of all together.

  Attributes:
    megabytes: of an uploaded file.
    megapixels: of an uploaded picture.
    letters: of an instruction.
    queue: requests that wait; more are turned away.
    images: pictures of one request.
  """

  megabytes: float = 10.0
  megapixels: float = 16.0
  letters: int = 500
  queue: int = 16
  images: int = 4

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value <= 0:
        raise ValueError(
          f'{field.name}={value}; accepted: above 0 (set --{field.name})'
        )

  def picture(self, path: str, name: str = '') -> UInt8[np.ndarray, 'H W 3']:
    """An uploaded picture; its header is judged before it is decoded.

    Args:
      path: of the file.
      name: how the visitor calls it.

    Raises:
      ValueError: too large, of another format, or broken.
    """
    name = pathlib.PurePath(name or path).name[:60]
    size = pathlib.Path(path).stat().st_size / 2**20
    if size > self.megabytes:
      raise ValueError(
        f'{name}: {size:.1f} MB; accepted: up to {self.megabytes:g} MB'
      )
    try:
      with Image.open(path) as image:
        kind, pixels = image.format, image.width * image.height / 1e6
    except Exception as error:  # decoders raise all kinds
      raise ValueError(
        f'{name} is no picture that can be read; accepted: '
        f'{", ".join(_FORMATS)}'
      ) from error
    if kind not in _FORMATS:
      raise ValueError(f'{name}: {kind}; accepted: {", ".join(_FORMATS)}')
    if pixels > self.megapixels:
      raise ValueError(
        f'{name}: {pixels:.3g} megapixels; accepted: up to {self.megapixels:g}'
      )
    return decode(path, name)

  def prompt(self, text: str | None) -> str:
    """An instruction.

    Raises:
      ValueError: too long.
    """
    text = text or ''
    if len(text) > self.letters:
      raise ValueError(
        f'an instruction of {len(text)} letters; accepted: up to {self.letters}'
      )
    return text


class Guard:
  """ASGI middleware: headers of every answer, and no fetching for others.

  The server would otherwise fetch any address that is given as a file.
  """

  def __init__(self, app: Callable[..., Awaitable[None]]):
    self._app = app

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Answers one request."""
    path = urllib.parse.unquote(scope.get('path', ''))
    if 'file=http' in path.replace(' ', '').lower() or '/proxy=' in path:
      await send({'type': 'http.response.start', 'status': 403, 'headers': []})
      await send({'type': 'http.response.body', 'body': b'forbidden'})
      return

    async def guarded(message: Any) -> None:
      if message['type'] == 'http.response.start':
        headers = [*message.get('headers', []), *_HEADERS]
        message = {**message, 'headers': headers}
      await send(message)

    await self._app(scope, receive, guarded)
