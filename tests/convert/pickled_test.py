"""Checkpoints that PyTorch wrote; skipped where it is not installed."""

import argparse
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from scar_jax.convert.readers import open_checkpoint

torch = pytest.importorskip('torch')


def tensors(**more):
  a = torch.arange(6, dtype=torch.float32).reshape(2, 3)
  return {'a.weight': a, 'b': torch.tensor(2.5), **more}


def saved(tmp_path, tree, **options):
  path = tmp_path / 'x.pt'
  torch.save(tree, path, **options)
  return path


@pytest.mark.parametrize(
  'wrap',
  [
    lambda t: t,
    lambda t: {'model': t},
    lambda t: {'state_dict': t, 'epoch': 3},
    lambda t: {'module': {f'_orig_mod.{k}': v for k, v in t.items()}},
    lambda t: {'ema': t},
    lambda t: {'trainer': {'var_wo_ddp': t}},
  ],
)
def test_containers_are_removed(tmp_path, wrap):
  state = open_checkpoint(saved(tmp_path, wrap(tensors())))
  assert set(state) == {'a.weight', 'b'}
  np.testing.assert_array_equal(state['a.weight'], [[0, 1, 2], [3, 4, 5]])
  assert state['b'].shape == ()
  assert not state.extras


def test_a_training_checkpoint_keeps_its_optimizer_apart(tmp_path):
  tree = {
    'model': tensors(),
    'ema': {k: 2 * v for k, v in tensors().items()},
    'optimizer': {'state': {0: {'exp_avg': torch.zeros(3)}}},
    'steps': 10,
    'args': argparse.Namespace(lr=1e-4),
  }
  path = saved(tmp_path, tree)
  assert open_checkpoint(path)['b'] == 5.0
  state = open_checkpoint(path, 'model')
  assert state['b'] == 2.5
  assert {k: v.shape for k, v in state.extras.items()} == {
    'optimizer.state.0.exp_avg': (3,)
  }
  only = saved(tmp_path, {'optimizer': tree['optimizer']})
  with pytest.raises(
    ValueError, match=r'no weights: 1 tensors, optimizer\.sta'
  ):
    open_checkpoint(only)


def test_beside_a_container_lies_what_is_no_weight(tmp_path):
  path = saved(tmp_path, {'model': tensors(), 'lpips': tensors()})
  state = open_checkpoint(path)
  assert set(state) == {'a.weight', 'b'}
  assert set(state.extras) == {'lpips.a.weight', 'lpips.b'}


def test_number_types_and_views(tmp_path):
  base = torch.randn(4, 6, dtype=torch.float32)
  tree = {
    'bf16': base.bfloat16(),
    'fp16': base.half(),
    'fp64': base.double(),
    'turned': base.T,
    'part': base[1:3, ::2],
    'ids': torch.arange(3),
  }
  state = open_checkpoint(saved(tmp_path, tree))
  want = base.numpy()
  for name, value in {
    'bf16': want.astype(ml_dtypes.bfloat16).astype(np.float32),
    'fp16': want.astype(np.float16).astype(np.float32),
    'fp64': want,
    'turned': want.T,
    'part': want[1:3, ::2],
  }.items():
    for _ in range(2):  # mapped pages that were let go come back
      np.testing.assert_array_equal(state[name], value)
    assert state[name].dtype == np.float32
  assert state['ids'].dtype == np.int64
  assert state.shapes['bf16'].dtype == ml_dtypes.bfloat16


def test_the_old_format_is_read_too(tmp_path):
  path = saved(tmp_path, tensors(), _use_new_zipfile_serialization=False)
  np.testing.assert_array_equal(open_checkpoint(path)['b'], 2.5)


@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize('kept', [0.0, 0.3, 0.9])
def test_a_cut_file_is_named(tmp_path, new, kept):
  path = saved(tmp_path, tensors(), _use_new_zipfile_serialization=new)
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * kept)])
  with pytest.raises(ValueError, match=r'x\.pt .*downloaded to the end'):
    open_checkpoint(path)


class Evil:
  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return os.mkdir, (self.path,)


@pytest.mark.parametrize('new', [True, False])
def test_code_in_a_file_is_not_run(tmp_path, new):
  trap = tmp_path / 'trap'
  tree = {'model': tensors(), 'x': Evil(trap)}
  path = saved(tmp_path, tree, _use_new_zipfile_serialization=new)
  with pytest.raises(ValueError, match=r'more than tensors: \w+\.mkdir\. Noth'):
    open_checkpoint(path)
  path.write_bytes(pickle.dumps(Evil(trap)))
  with pytest.raises(ValueError, match=r'x\.pt '):
    open_checkpoint(path)
  assert not trap.exists()


def test_tensors_that_are_not_dense_are_refused(tmp_path):
  path = saved(tmp_path, {'s': torch.eye(3).to_sparse()})
  with pytest.raises(ValueError, match=r'sparse_coo tensor .*accepted: dense'):
    open_checkpoint(path)
