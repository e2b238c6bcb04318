"""The notebook of the Python interface runs from top to bottom."""

import json
import pathlib

import pytest
from scar_setup import finished_runs

_NOTEBOOK = pathlib.Path(__file__).parents[2] / 'launch/quickstart.ipynb'


def test_every_cell_runs(tmp_path, monkeypatch):
  pytest.importorskip('cv2')
  run = finished_runs(tmp_path / 'runs') / 'scar_run'
  monkeypatch.setenv('WORKDIR', str(run))
  names = {}
  cells = json.loads(_NOTEBOOK.read_text())['cells']
  for i, cell in enumerate(cells):
    if cell['cell_type'] == 'code':
      code = compile(''.join(cell['source']), f'cell {i}', 'exec')
      exec(code, names)
  assert names['told'][-1] == '3 of 3'
  assert not any(cell.get('outputs') for cell in cells)
