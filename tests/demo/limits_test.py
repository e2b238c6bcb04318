"""What the demo lets in, and what it keeps out."""

import asyncio

import numpy as np
import pytest
from PIL import Image

from scar_jax.demo.limits import Guard, Limits


def test_uploads_are_judged_before_they_are_decoded(tmp_path, case):
  limits = Limits(megabytes=0.01, megapixels=0.001)
  good = tmp_path / 'good.png'
  Image.new('RGB', (20, 30), 'red').save(good)
  assert limits.picture(str(good)).shape == (30, 20, 3)
  Image.new('1', (100, 100)).save(tmp_path / 'large.png')
  with pytest.raises(
    ValueError, match=r'large.png: 0\.01 megapixels; .* 0.001'
  ):
    limits.picture(str(tmp_path / 'large.png'))
  noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / 'heavy.png')
  with pytest.raises(ValueError, match=r'heavy.png: .* MB; accepted: up to 0.'):
    limits.picture(str(tmp_path / 'heavy.png'))
  Image.new('RGB', (4, 4)).save(tmp_path / 'a.ppm')
  with pytest.raises(ValueError, match=r'a\.ppm: PPM; accepted: PNG, JPEG'):
    limits.picture(str(tmp_path / 'a.ppm'))
  with pytest.raises(
    ValueError, match=r'x\.png is no picture that can be read'
  ):
    limits.picture(str(case('c06_html_not_image.jpg')), '../../x.png')
  with pytest.raises(ValueError, match=r'cannot be decoded'):
    Limits().picture(str(case('c06_truncated.jpg')))


def test_limits_are_checked_and_told():
  with pytest.raises(
    ValueError, match=r'queue=0; accepted: above 0 .* --queue'
  ):
    Limits(queue=0)
  with pytest.raises(ValueError, match='an instruction of 501 letters; acc'):
    Limits().prompt('x' * 501)
  assert Limits().prompt(None) == ''


def _ask(path):
  """Status and headers of the guarded answer."""
  sent = []

  async def app(scope, receive, send):
    await send({'type': 'http.response.start', 'status': 200, 'headers': []})

  async def send(message):
    sent.append(message)

  scope = {'type': 'http', 'path': path}
  asyncio.run(Guard(app)(scope, None, send))
  return sent[0]['status'], dict(sent[0]['headers'])


@pytest.mark.parametrize(
  'path',
  ['/gradio_api/file=http://x', '/file=HTTPS%3A//x', '/gradio_api/proxy=a'],
)
def test_the_server_fetches_nothing_for_others(path):
  assert _ask(path)[0] == 403


def test_pages_load_from_their_own_server_only():
  status, headers = _ask('/gradio_api/file=/tmp/a.png')
  assert status == 200
  policy = headers[b'content-security-policy'].decode()
  assert "default-src 'self'" in policy
  assert 'http' not in policy
