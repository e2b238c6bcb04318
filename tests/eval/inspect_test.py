"""`scar inspect`: weights are those of the model, places are right."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scar_setup import SIZE, finished_runs

from scar_jax.cli import main
from scar_jax.editor import Editor
from scar_jax.eval import inspect as looking
from scar_jax.eval.inspect_picture import principal
from scar_jax.models.attention import attend
from scar_jax.models.blocks import Attention, Carry, Shared
from scar_jax.models.decoder import DecoderConfig
from scar_jax.sharding import unbox


def _picture(seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope='module', params=['raster', 'random', 'scale'])
def editor(request, tmp_path_factory):
  runs = finished_runs(
    tmp_path_factory.mktemp('runs'), request.param, order__num_sets=2
  )
  return Editor.load(runs / 'scar_run', batch=1)


def test_queries_and_keys_give_the_weights_of_the_layer():
  cfg = DecoderConfig(width=8, layers=1, heads=2, vocab=5)
  layer = Attention(cfg)
  x = jax.random.normal(jax.random.key(0), (1, 5, 8))
  mask = jnp.tril(jnp.ones((1, 5, 5), bool))
  rest = Carry(x, None, None), Shared(mask, None, None, None, None), 0, None

  @jax.jit
  def run(x):
    params = unbox(layer.init(jax.random.key(1), x, *rest)['params'])
    _, kept = layer.apply(
      {'params': params}, x, *rest, mutable=['intermediates']
    )
    return params['qkv']['kernel'], kept

  kernel, kept = run(x)
  q, k = kept['intermediates']['qk'][0]
  # The values become unit vectors, so that the output is the weights.
  plain = jnp.einsum('bld,dchk->bclhk', x, kernel)
  unit = jnp.broadcast_to(jnp.eye(5)[:, None, :4], (1, 5, 2, 4))
  want = attend(plain[:, 0], plain[:, 1], unit, mask).mean(2)
  found = looking._weights(q[None], k[None], mask)[0]
  np.testing.assert_allclose(found[..., :4], want, atol=1e-5)


def test_what_is_seen_adds_up(editor):
  found = looking.inspect(editor, _picture(), 'red', seed=3)
  order = editor.cfg.model.order
  np.testing.assert_allclose(found.shares.sum(1), 1, atol=1e-5)
  assert (found.shares[:, 0] > 0).all()
  assert found.entropy.shape == found.surprise.shape == found.places.shape
  # 16 codes hold four bits.
  assert 0 < found.entropy.max() <= 4 + 1e-5
  cells = found.grid[0] * found.grid[1]
  assert sorted(found.places) == list(range(cells))
  assert len(found.set_entropy) == len(editor.cfg.model.make_order().set_sizes)
  if order == 'raster':
    np.testing.assert_allclose(found.set_entropy, found.entropy, rtol=1e-5)
  assert np.abs(found.features['F_s'] - found.features['F_t']).max() > 1e-3
  assert set(found.features) == {'F_s', 'F_c', 'restored', 'F_t'}
  assert found.cosines['H_s, P_t'].shape == found.prefix_grid == (2, 2)


@pytest.mark.parametrize('editor', ['raster'], indirect=True)
def test_a_truth_takes_the_place_of_the_result(editor):
  truth = _picture(9)
  found = looking.inspect(editor, truth, 'red', target=truth)
  np.testing.assert_array_equal(found.result, truth)
  # The source as its own truth has its features twice.
  np.testing.assert_allclose(
    found.features['F_s'], found.features['F_t'], atol=1e-5
  )


def test_components_share_their_colours():
  rng = np.random.default_rng(0)
  a = rng.standard_normal((4, 4, 6))
  found = principal({'a': a, 'b': a[::-1], 'thin': a * 0})
  np.testing.assert_array_equal(found['a'], found['b'][::-1])
  assert found['a'].std() > 20
  assert len(np.unique(found['thin'].reshape(-1, 3), axis=0)) == 1
  assert principal({}) == {}
  two = principal({'x': rng.standard_normal((3, 3, 2))})['x']
  assert not two[..., 2].any()


def test_the_command_draws(tmp_path, capsys):
  runs = finished_runs(tmp_path / 'runs', prefix__compress='off')
  Image.fromarray(_picture()).save(tmp_path / 'in.png')
  words = [
    'inspect', f'--workdir={runs}/scar_run', f'--image={tmp_path}/in.png',
    '--prompt=red', f'--out={tmp_path}/out.png', f'--json={tmp_path}/o.json',
  ]  # fmt: skip
  assert main(words) == 0, capsys.readouterr().err
  assert Image.open(tmp_path / 'out.png').width > 1000
  summary = json.loads((tmp_path / 'o.json').read_text())
  assert summary['attention_to_prefix'] == 0
  assert summary['attention_to_text'] > 0
  assert main(['inspect']) == 1
  assert '--workdir, --image, --out not given' in capsys.readouterr().err
