"""Checkpoints: other meshes, cut and stray entries, full disks."""

import pathlib
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
from kills import prove
from toy import ToyLoader, ToyTask
from toy_run import toy_config, toy_train

from scar_jax.sharding import batch_sharding, make_mesh
from scar_jax.train import checkpoints
from scar_jax.train import state as state_lib
from scar_jax.train.checkpoints import CheckpointError, Checkpoints
from scar_jax.train.optim import make_optimizer
from scar_jax.train.step import make_step
from scar_jax.train.tasks import abstract
from scar_jax.train.whole import scan


class _Toy:
  """State, shardings and step of the toy on some of the devices."""

  def __init__(self, devices=8, ema=0.9, **axes):
    config = toy_config(ema=ema)
    self.task = ToyTask()
    self.mesh = make_mesh({'data': 1, **axes}, jax.devices()[:devices])
    self.batch = next(ToyLoader())
    with jax.set_mesh(self.mesh):
      boxed = state_lib.abstract_variables(self.task, abstract(self.batch))
      tx = make_optimizer(config.optim, 100, boxed['params'])
      init = state_lib.make_init(self.task, tx, abstract(self.batch), ema > 0)
      shapes = state_lib.abstract_state(init)
      self.places = state_lib.state_shardings(shapes, boxed, self.mesh)
      self.abstract = checkpoints.abstract_with(shapes, self.places)
      self.state = state_lib.create(init, self.places, 0)
      self.step = jax.jit(make_step(self.task, tx, config.optim, 100, 1, ema))

  def train(self, state, loader, steps):
    losses = []
    with jax.set_mesh(self.mesh):
      for _ in range(steps):
        batch = jax.device_put(next(loader), batch_sharding(self.mesh))
        state, metrics = self.step(state, self.task.frozen, batch)
        losses.append(float(metrics['loss']))
    return state, losses


def _store(workdir, **more):
  return Checkpoints(workdir, {'model': {'width': 16}}, keep=9, **more)


def _equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """20 steps of 8 images on 4 x 2 devices, saved, and the step after."""
  workdir = tmp_path_factory.mktemp('saved')
  toy = _Toy(data=4, tensor=2)
  loader = ToyLoader()
  state, _ = toy.train(toy.state, loader, 20)
  store = _store(workdir)
  store.save(state, loader.get_state(), {'loss': 1.0})
  store.close()
  _, losses = toy.train(state, loader, 1)
  return workdir, state, losses[0]


@pytest.mark.parametrize(
  ('devices', 'axes'),
  [
    (1, {}),
    (4, {'data': 2, 'tensor': 2}),
    (8, {'data': 8}),
    (8, {'fsdp': 8}),
  ],
)
def test_restores_bit_equal_on_another_mesh(saved, devices, axes):
  workdir, state, loss = saved
  toy = _Toy(devices, **axes)
  store = _store(workdir)
  found, position = store.restore(toy.abstract, required=True)
  store.close()
  _equal(found, state)
  assert position == {'next': 160}
  kernel = found.params['up']['kernel']
  assert kernel.sharding == toy.places.params['up']['kernel']
  loader = ToyLoader()
  loader.set_state(position)
  _, losses = toy.train(found, loader, 1)
  assert losses[0] == pytest.approx(loss, rel=1e-5)


def test_from_8_devices_to_4_to_1_and_back_bit_by_bit(saved, tmp_path):
  workdir, state, _ = saved
  meshes = [(4, {'fsdp': 4}), (1, {}), (8, {'data': 4, 'tensor': 2})]
  for number, (devices, axes) in enumerate(meshes):
    toy = _Toy(devices, **axes)
    store = _store(workdir)
    found, position = store.restore(toy.abstract, required=True)
    store.close()
    assert jax.tree.map(lambda x: x.sharding, found) == toy.places
    workdir = tmp_path / str(number)
    store = _store(workdir)
    store.save(found, position)
    store.close()
  _equal(found, state)


def _line(caught, name):
  lines = [
    r.getMessage() for r in caught if f'ignored {name} ' in r.getMessage()
  ]
  assert len(lines) == 1, name
  return lines[0]


def _stale_folder(workdir):
  """The layout of case C29, cut from real checkpoints."""
  toy = _Toy(1)
  store = _store(workdir)
  for step in (99, 100, 200, 300):
    state = toy.state.replace(step=jax.numpy.int32(step))
    store.save(state, {'next': step * 8}, {'loss': 1.0})
  store.close()
  folder = pathlib.Path(store.folder)
  (folder / '200' / '_CHECKPOINT_METADATA').unlink()
  shutil.rmtree(folder / '200' / 'params' / 'd', ignore_errors=True)
  (folder / '300').rename(folder / '300.tmp-1700000000')
  (folder / 'latest').write_text('200\n')
  (folder / '.DS_Store').write_text('x')
  (folder / 'notes.txt').write_text('x')
  return toy, folder


def test_cut_and_stray_entries_are_ignored_by_name(tmp_path, case, caplog):
  given = {p.name for p in case('c29_ckpt_dir').iterdir()}
  toy, folder = _stale_folder(tmp_path)
  assert given <= {p.name for p in folder.iterdir()}
  before = sorted(str(p) for p in folder.rglob('*'))
  assert scan(folder)[0] == [99, 100]
  store = _store(tmp_path)
  state, position = store.restore(toy.abstract, required=True)
  assert int(state.step) == 100
  assert position == {'next': 800}
  for name in ('300.tmp-1700000000', 'latest', '.DS_Store', 'notes.txt'):
    assert 'not a step number' in _line(caplog.records, name)
  assert 'no commit mark' in _line(caplog.records, '200')
  assert sorted(str(p) for p in folder.rglob('*')) == before
  # A save at the stale step is not skipped, and destroys nothing.
  state = state.replace(step=jax.numpy.int32(200))
  store.save(state, {'next': 1600}, {'loss': 1.0})
  store.close()
  assert scan(folder)[0] == [99, 100, 200]
  assert (folder / '200.stale-0' / 'params').is_dir()


def test_no_whole_checkpoint_and_resume_asked_is_an_error(tmp_path):
  toy, folder = _stale_folder(tmp_path)
  for step in ('99', '100'):
    (folder / step / '_CHECKPOINT_METADATA').write_text('{')
  store = _store(tmp_path)
  with pytest.raises(
    CheckpointError, match=r'no whole checkpoint in .*7 entries ignored.*100'
  ):
    store.restore(toy.abstract, required=True)
  store.close()


def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, caplog):
  toy, folder = _stale_folder(tmp_path)
  for path in (folder / '100' / 'train_state').rglob('*'):
    if path.is_file() and path.name != '_METADATA':
      path.write_bytes(b'')
  store = _store(tmp_path)
  state, _ = store.restore(toy.abstract)
  store.close()
  assert int(state.step) == 99
  assert 'it cannot be read' in _line(caplog.records, '100')


def test_keeps_the_newest_and_the_best(tmp_path):
  toy = _Toy(1)
  store = Checkpoints(tmp_path, {}, keep=2)
  for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 9.0), (5, 8.0)):
    state = toy.state.replace(step=jax.numpy.int32(step))
    store.save(state, {}, {'loss': loss})
  store.close()
  assert scan(store.folder)[0] == [2, 4, 5]


def test_unknown_best_metric_lists_the_known(tmp_path):
  toy = _Toy(1)
  store = Checkpoints(tmp_path, {}, best='fid')
  with pytest.raises(ValueError, match=r"train.best='fid'.* loss, mse"):
    store.save(toy.state, {}, {'loss': 1.0, 'mse': 1.0})
  store.close()


def test_non_finite_parameters_are_never_saved(tmp_path):
  toy = _Toy(1)
  store = _store(tmp_path)
  store.save(toy.state, {'next': 0}, {'loss': 1.0})
  bad = jax.tree.map(lambda x: x.at[0].set(np.nan), toy.state.params)
  bad = toy.state.replace(params=bad, step=jax.numpy.int32(1))
  with pytest.raises(CheckpointError, match='step 1: parameters are not fin'):
    store.save(bad, {'next': 8})
  store.close()
  assert scan(store.folder)[0] == [0]


def test_save_is_not_disturbed_by_donation(tmp_path):
  toy = _Toy(8, data=8)
  want = jax.tree.map(np.array, toy.state)
  store = _store(tmp_path)
  donated = jax.jit(
    lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0
  )
  state = toy.state
  store.save(state, {})
  for _ in range(20):
    state = donated(state)
  store.wait()
  found, _ = store.restore(toy.abstract)
  store.close()
  _equal(found, want)


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
  toy_train(tmp_path, steps=2)
  before = (tmp_path / 'checkpoints' / '2' / 'params' / '_METADATA').read_text()
  original = checkpoints.ocp.CheckpointManager.save

  def full(self, step, *args, **kwargs):
    if step == 4:
      raise OSError(28, 'No space left on device')
    return original(self, step, *args, **kwargs)

  monkeypatch.setattr(checkpoints.ocp.CheckpointManager, 'save', full)
  with pytest.raises(
    CheckpointError,
    match=r'checkpoint 4 could not be written .*No space left.*step 2 in',
  ):
    toy_train(tmp_path, steps=6)
  path = tmp_path / 'checkpoints' / '2' / 'params' / '_METADATA'
  assert path.read_text() == before
  monkeypatch.undo()
  assert toy_train(tmp_path, steps=6)['steps'] == 6


def test_a_disk_that_fills_in_the_background_is_told(tmp_path):
  """Every file above 2 KiB fails, as on a full disk, after the save began."""
  toy = _Toy(1)
  store = _store(tmp_path)
  store.save(toy.state, {'next': 0})
  store.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
  try:
    store.save(toy.state.replace(step=jax.numpy.int32(1)), {'next': 8})
    with pytest.raises(CheckpointError, match=r'could not be written.*step 0'):
      store.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert scan(store.folder)[0] == [0]


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(tmp_path):
  """Few kills here; `python tests/train/kills.py --kills=20` makes more."""
  figures = prove(tmp_path, kills=2, seed=1)
  assert figures['losses_equal'] >= figures['steps']
