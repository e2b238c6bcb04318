"""The demo in a headless browser; needs gradio, playwright and chromium."""

import json
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from scar_setup import finished_runs

_BROWSER = shutil.which('chromium') or shutil.which('chromium-browser')


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  """A served page of a model that draws parts anew, and its address."""
  pytest.importorskip('gradio')
  from scar_jax.demo.limits import Limits
  from scar_jax.demo.page import Page
  from scar_jax.editor import Editor

  home = tmp_path_factory.mktemp('demo')
  run = finished_runs(home / 'runs') / 'scar_run'
  (home / 'files').mkdir()
  example = np.zeros((8, 8, 3), np.uint8)
  made = Page(
    Editor.load(run), 'runs/it', home / 'files', [(example, 'red')],
    Limits(megabytes=1),
  )  # fmt: skip
  address = made.serve('127.0.0.1', 0, block=False)
  yield made, address
  made.blocks.close()


def _status(address):
  try:
    with urllib.request.urlopen(address) as answer:
      return answer.status
  except urllib.error.HTTPError as error:
    return error.code


def test_only_files_of_the_page_are_served(page, tmp_path):
  made, address = page
  secret = tmp_path / 'secret.txt'
  secret.write_text('x')
  for name in (
    secret, '/etc/passwd', '../../../../etc/passwd', 'setup.py',
    made._folder / '../runs/scar_run/artifact/config.json',
  ):  # fmt: skip
    assert _status(f'{address}gradio_api/file={name}') in (403, 404), name
  assert _status(f'{address}gradio_api/file={made._folder}/example0.png') == 200


def test_bad_requests_are_told(page):
  made, _ = page
  given = ['red', 'the picture itself', 2.0, 1.0, 0, 0, 1, 0]
  with pytest.raises(Exception, match='no picture; upload one'):
    next(made.make(None, *given))
  picture = np.zeros((9, 5, 3), np.uint8)
  given[6] = 99
  with pytest.raises(Exception, match='99 pictures; accepted: 1 to 4'):
    next(made.make(picture, *given))
  given[6] = 1
  *_, last = made.make(picture, *given)
  assert [image.size for image in last[0]] == [(5, 9)]
  assert Image.open(last[3]).size == (5, 9)
  assert last[4].startswith('scar edit --workdir=runs/it --image=in.png')


def test_a_visitor_edits_a_picture(page, tmp_path):
  api = pytest.importorskip('playwright.sync_api')
  if _BROWSER is None:
    pytest.skip('no chromium (apt-get install chromium)')
  address = page[1]
  Image.new('RGB', (12, 9), 'blue').save(tmp_path / 'blue.png')
  (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\nbroken')
  outside = []
  with api.sync_playwright() as play:
    browser = play.chromium.launch(
      executable_path=_BROWSER, args=['--no-sandbox']
    )
    tab = browser.new_page(viewport={'width': 390, 'height': 844})
    tab.set_default_timeout(240_000)
    own = (address, 'data:', 'blob:')
    tab.on(
      'request',
      lambda r: None if r.url.startswith(own) else outside.append(r.url),
    )
    tab.goto(address)
    tab.wait_for_selector('#make')
    # A phone shows all of it without scrolling sideways.
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390
    tab.set_input_files('#picture input[type=file]', tmp_path / 'blue.png')
    tab.wait_for_selector('#picture img')
    tab.fill('#prompt textarea', 'red')
    tab.click('#make')
    done = "document.querySelector('#status').innerText.includes('Done')"
    tab.wait_for_function(done)
    tab.wait_for_selector('#gallery img')
    assert 'scar edit' in tab.input_value('#command textarea')
    tab.reload()
    tab.wait_for_selector('#make')
    tab.set_input_files('#picture input[type=file]', tmp_path / 'broken.png')
    tab.wait_for_selector('#picture img', state='attached')
    tab.click('#make')
    told = tab.wait_for_selector('.toast-body').inner_text()
    browser.close()
  assert 'broken.png is no picture that can be read' in told
  assert json.dumps(outside) == '[]'
