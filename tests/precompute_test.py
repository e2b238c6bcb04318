"""`scar tokenize` and training from what it made."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from scar_cases import noisy
from scar_setup import SIZE, frozen_artifacts, scar_config

from scar_jax import precompute
from scar_jax.artifacts import save_artifact
from scar_jax.cli import main
from scar_jax.config import to_dict
from scar_jax.data import manifest
from scar_jax.data.records import Rows
from scar_jax.data.sources import make_source
from scar_jax.precompute import Precompute, Wanted
from scar_jax.sharding import make_mesh, unbox
from scar_jax.train import inputs

COUNT, BAD = 12, 5
EPOCH = COUNT // 4  # batches
WANTED = Wanted(features=True, variants=2, shard_rows=7, batch=8)


@pytest.fixture(scope='module', autouse=True)
def _one_device():
  """Eight emulated devices take many times as long."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'local_devices', lambda **_: jax.devices()[:1])
    yield


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Artifacts, and records of which one has no target."""
  root = tmp_path_factory.mktemp('cache')
  for name, part in frozen_artifacts().items():
    save_artifact(root / name, name, part.config, part.params)
  folder = root / 'jsonl'
  folder.mkdir()
  rng = np.random.default_rng(0)
  lines = []
  for i in range(COUNT):
    line = {'instruction': f'text {i}'}
    for role in ('target', 'source'):
      line[role] = f'{i}_{role}.png'
      pixels = rng.integers(0, 256, (16, 12, 3), np.uint8)
      Image.fromarray(pixels).save(folder / line[role])
    lines.append(json.dumps(line))
  (folder / f'{BAD}_target.png').write_bytes(b'<html>')
  (folder / 'train.jsonl').write_text('\n'.join(lines))
  return root


def setup(root, **fields):
  """A config whose crops and mirroring are drawn."""
  given = dict(
    data__source='jsonl',
    data__path=str(root / 'jsonl'),
    data__batch=4,
    data__crop_ratio=1.5,
    data__flip=0.5,
    data__max_bad_share=0.2,
    tokenizer__artifact=str(root / 'tokenizer'),
    encoder__artifact=str(root / 'encoder'),
  )
  return scar_config(**(given | fields))


def cached(root, folder, **fields):
  return setup(root, data__source='cache', data__path=str(folder), **fields)


def make(root, out, wanted=WANTED, process=0, processes=1, **fields):
  work = Precompute(setup(root, **fields), wanted)
  done = list(work.make(pathlib.Path(out), process, processes))
  return done, manifest.finish(pathlib.Path(out), work.job)


@pytest.fixture(scope='module')
def made(root):
  done, whole = make(root, root / 'made')
  return root / 'made', done, whole


def content(folder):
  names = sorted(p.name for p in folder.iterdir())
  return {name: (folder / name).read_bytes() for name in names}


def one_device():
  return make_mesh({'data': 1}, jax.devices()[:1])


def test_a_cache_says_what_it_holds(made):
  folder, done, whole = made
  assert [d['shard'] for d in done] == [0, 1, 2, 3]  # 24 rows of 7
  assert not any(d['kept'] for d in done)
  assert (whole['rows'], whole['failed']) == (2 * COUNT, 2)
  assert whole['columns'] == {
    'features': ['float32', [4, 4, 8]],
    'target_features': ['float32', [4, 4, 8]],
    'text': ['int32', [4]],
    'text_mask': ['bool', [4]],
    'tokens': ['uint16', [4]],
  }
  assert set(whole['made_with']) == {'tokenizer', 'encoder'}
  failed = [json.loads(x) for x in (folder / 'failed.jsonl').open()]
  assert [(f['record'], f['variant']) for f in failed] == [(BAD, 0), (BAD, 1)]
  assert 'train.jsonl:6' in failed[0]['key']
  assert 'not an image' in failed[0]['reason']
  for shard in whole['shards']:
    assert manifest.checksum(folder / shard['file']) == shard['sha256']


def test_the_first_epochs_have_the_losses_of_training_without_it(root, made):
  config, stored = setup(root), cached(root, made[0])
  mesh = one_device()
  task, marks = inputs.make_task(config, mesh)
  other, _ = inputs.make_task(stored, mesh)
  assert set(other.frozen) == {'tokenizer'}  # nothing else runs
  assert set(task.flops(4)) - set(other.flops(4)) == {'tokenizer', 'encoder'}
  fly, rest = (
    inputs.make_loader(c, mesh, marks=marks) for c in (config, stored)
  )
  first = next(rest)
  shapes = jax.eval_shape(other.init, jax.random.key(0), first)
  params = noisy(unbox(shapes['params']))
  rest.set_state(fly.get_state())

  def loss_of(task):
    loss = jax.jit(task.loss, static_argnums=5)
    return lambda batch, k: loss(
      params, {}, task.frozen, batch, jax.random.key(k), True
    )

  plain, from_cache = loss_of(task), loss_of(other)
  seen = []
  for k in range(2 * EPOCH):
    a, b = next(fly), next(rest)
    assert 'target' not in b
    assert 'condition' not in b
    np.testing.assert_array_equal(a['index'], b['index'])
    np.testing.assert_array_equal(a['valid'], b['valid'])
    (want, (metrics, _)), (got, (other_metrics, _)) = (
      plain(a, k),
      from_cache(b, k),
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name, value in metrics.items():
      np.testing.assert_allclose(other_metrics[name], value, 2e-4, 1e-5)
    seen.append(b)
  assert not all(b['valid'].all() for b in seen)  # the bad record came
  # The third epoch reads the rows of the first, in another order.
  rows = {}
  for batch in seen[:EPOCH]:
    rows |= dict(zip(batch['index'], batch['features'], strict=True))
  third = [next(rest) for _ in range(EPOCH)]
  for batch in third:
    for index, features in zip(batch['index'], batch['features'], strict=True):
      if index != BAD:
        np.testing.assert_array_equal(features, rows[index])
  order = [[*np.concatenate([b['index'] for b in some])] for some in (
    seen[:EPOCH], third
  )]  # fmt: skip
  assert order[0] != order[1]


def test_pictures_are_kept_where_features_are_not(root, tmp_path):
  """The step then runs the encoder on the very same pixels."""
  make(root, tmp_path, Wanted(shard_rows=100, batch=8))
  mesh = one_device()
  fly = inputs.make_loader(setup(root), mesh)
  rest = inputs.make_loader(cached(root, tmp_path), mesh)
  task, _ = inputs.make_task(cached(root, tmp_path), mesh)
  assert set(task.frozen) == {'tokenizer', 'encoder'}
  encode = jax.jit(task.parts.tokens)
  for _ in range(EPOCH):
    a, b = next(fly), next(rest)
    tokens = b.pop('tokens')
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    grid = encode(task.frozen, b['target'])
    np.testing.assert_array_equal(grid.reshape(4, -1), tokens)


def test_killed_and_resumed(root, made, tmp_path, monkeypatch):
  class Killed(BaseException):
    pass

  class Dies(precompute.ShardWriter):
    left = 10  # rows, of which 7 are the first shard

    def write(self, row):
      Dies.left -= 1
      if Dies.left < 0:
        raise Killed
      super().write(row)

  with monkeypatch.context() as patch:
    patch.setattr(precompute, 'ShardWriter', Dies)
    with pytest.raises(Killed):
      make(root, tmp_path)
  with pytest.raises(ValueError, match='is not finished; run scar tokenize'):
    make_source(cached(root, tmp_path).data)
  first = tmp_path / 'rows-00000-of-00004.array_record'
  assert [p.name for p in tmp_path.glob('*.array_record*')] != []
  node = first.stat().st_ino
  done, whole = make(root, tmp_path)
  assert [d['kept'] for d in done] == [True, False, False, False]
  assert first.stat().st_ino == node
  assert whole is not None
  assert content(tmp_path) == content(made[0])


def test_processes_share_the_shards(root, made, tmp_path):
  done, whole = make(root, tmp_path, process=1, processes=2)
  assert [d['shard'] for d in done] == [1, 3]
  assert whole is None
  done, whole = make(root, tmp_path, process=0, processes=2)
  assert [d['shard'] for d in done] == [0, 2]
  assert whole is not None
  assert content(tmp_path) == content(made[0])


def test_damaged_shards_are_found_and_made_anew(root, made, tmp_path):
  for name, some in content(made[0]).items():
    (tmp_path / name).write_bytes(some)
  path = tmp_path / 'rows-00001-of-00004.array_record'
  whole = path.read_bytes()
  middle = len(whole) // 2
  path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
  config = cached(root, tmp_path, data__max_bad_share=1.0)
  loader = inputs.make_loader(config, one_device())
  seen = [next(loader) for _ in range(2 * EPOCH)]
  reasons = [b for b in loader.bad.found.values() if 'rows-00001' in b.key]
  assert reasons
  assert 'scar tokenize with the same' in reasons[0].reason
  assert sum((~b['valid']).sum() for b in seen) > 2
  path.write_bytes(whole[:-1])
  with pytest.raises(ValueError, match=r'rows-00001.* bytes; expected'):
    make_source(config.data)
  path.unlink()
  with pytest.raises(ValueError, match=r'rows-00001.* is missing; expected'):
    make_source(config.data)
  path.write_bytes(bytes(len(whole)))
  done, _ = make(root, tmp_path)
  assert [d['shard'] for d in done if not d['kept']] == [1]
  assert content(tmp_path) == content(made[0])


def test_another_config_or_network_is_an_error(root, made, tmp_path):
  folder = made[0]
  whole = json.loads((folder / 'manifest.json').read_text())
  marks = dict(whole['made_with'])

  def load(marks=marks, **fields):
    return inputs.make_loader(cached(root, folder, **fields), marks=marks)

  assert isinstance(load().plan.source, Rows)
  with pytest.raises(ValueError, match=r'data.flip: 0.5 -> 0.25. Accepted:'):
    load(data__flip=0.25)
  with pytest.raises(ValueError, match=r'data.image_size: 8 -> 16'):
    load(data__image_size=2 * SIZE)
  with pytest.raises(ValueError, match=r'text.length: 4 -> 5'):
    load(text__length=5)
  with pytest.raises(ValueError, match=r"encoder.dtype: '' -> 'bfloat16'"):
    load(encoder__dtype='bfloat16')
  other = marks | {'tokenizer': 'abc'}
  text = f"fingerprint of tokenizer: '{marks['tokenizer']}' -> 'abc'"
  with pytest.raises(ValueError, match=text):
    load(marks=other)
  with pytest.raises(ValueError, match=r"of encoder: '.*' -> '\(absent\)'"):
    load(marks={'tokenizer': marks['tokenizer']})
  # And a folder takes rows of one job alone.
  with pytest.raises(
    ValueError, match=r'rows of another job \(.*data.crop_ratio: 1.5 -> 1.0'
  ):
    make(root, folder, data__crop_ratio=1.0)
  with pytest.raises(ValueError, match='holds rows of a batch, not pictures'):
    load().plan.source.load(0, None)
  with pytest.raises(ValueError, match=r'has no manifest.json; accepted: a'):
    make_source(cached(root, tmp_path).data)


def test_scores_are_taken_on_what_a_cache_was_made_from(root, made):
  plain = setup(root).data
  found = manifest.made_from(cached(root, made[0]).data)
  left = manifest.differences(vars(found), vars(plain))
  assert left == ['batch: 64 -> 4', 'max_bad_share: 0.05 -> 0.2']
  assert manifest.made_from(plain) is plain


def test_caches_are_mixed(root, made):
  part = {'source': 'cache', 'path': str(made[0])}
  config = setup(root, data__mixture=(part, part | {'weight': 3.0}))
  loader = inputs.make_loader(config, one_device())
  source = loader.plan.source
  assert (len(source), source.shares) == (2 * COUNT, (250, 750))
  batch = next(loader)
  assert batch['tokens'].shape == (4, 4)
  epochs = loader.plan.epochs_at(np.arange(4))
  assert len(set(epochs % 2)) == 2
  for i, epoch, tokens in zip(
    batch['index'].tolist(), epochs.tolist(), batch['tokens'], strict=True
  ):
    if i % COUNT != BAD:
      row = source.parts[0].row(i % COUNT, epoch)
      np.testing.assert_array_equal(tokens, row['tokens'])
  plain = {'source': 'jsonl', 'path': str(root / 'jsonl')}
  with pytest.raises(ValueError, match='some parts are caches and others'):
    make_source(setup(root, data__mixture=(part, plain)).data)


def test_what_cannot_be_stored_is_an_error(root, tmp_path, monkeypatch):
  def message(wanted=WANTED, **fields):
    with pytest.raises(ValueError) as error:
      Precompute(setup(root, **fields), wanted)
    return str(error.value)

  part = {'source': 'jsonl', 'path': str(root / 'jsonl')}
  assert 'accepted: one source' in message(data__mixture=(part,))
  text = message(order__name='scale', model__token_noise=0.3)
  assert 'model.token_noise=0.3 in the scale order' in text
  assert 'accepted: t5' in message(Wanted(text_features=True))
  assert 'has no features' in message(prefix__compress='vq')
  with monkeypatch.context() as patch:
    patch.setattr(jax, 'local_devices', lambda: jax.devices()[:2])
    assert '--batch=3 is not a multiple of the 2 de' in message(Wanted(batch=3))
  with pytest.raises(ValueError, match=r'max_bad_share=0\.01 allows'):
    make(root, tmp_path, data__max_bad_share=0.01)


def test_the_command(root, made, tmp_path, capsys):
  plain = to_dict(setup(root))
  (tmp_path / 'c.py').write_text(f'def get_config(arg=None): return {plain!r}')
  words = ['tokenize', f'--config={tmp_path}/c.py', f'--out={tmp_path}/out']
  small = ['--batch=8', '--shard_rows=8', '--features', '--dtype=bfloat16']
  assert main([*words, *small]) == 0
  shown = capsys.readouterr().out
  assert '12 records x 1 variants of ' in shown
  assert f'12 rows, 1 failed, listed in {tmp_path}/out/failed.jsonl' in shown
  assert main([*words, *small]) == 0
  assert '2 shards were whole already' in capsys.readouterr().out
  full = make_source(cached(root, made[0]).data).row(1, 0)['features']
  half = make_source(cached(root, tmp_path / 'out').data).row(1, 0)['features']
  assert half.nbytes * 2 == full.nbytes
  np.testing.assert_array_equal(half, full.astype(half.dtype))
  assert main([*words, '--processes=2']) == 1
  text = capsys.readouterr().err
  assert '--processes=2 --process=None; accepted: both' in text
  assert main(['tokenize', f'--config={tmp_path}/c.py']) == 1
  assert '--out not given. Example' in capsys.readouterr().err
