"""Network metrics against the reference libraries, with random weights."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from scar_jax.artifacts import save_artifact
from scar_jax.convert import clip as clip_names
from scar_jax.convert import vit as vit_names
from scar_jax.eval.metrics import clip, inception, lpips, structure
from scar_jax.models.encoders.clip import (
  CLIP,
  CLIPConfig,
  CLIPTextConfig,
  CLIPVisionConfig,
)
from scar_jax.models.encoders.semantic import encoder_around
from scar_jax.models.encoders.vit import ViTConfig


def _reference(name):
  """A reference library, or a skip: torchvision breaks beside another torch."""
  try:
    return importlib.import_module(name)
  except (ImportError, RuntimeError) as error:
    return pytest.skip(f'{name}: {error}')


def _picture(seed, height=40, width=48):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope='module')
def random_inception(tmp_path_factory):
  """A file of weights, and the reference that has read it."""
  torch = _reference('torch')
  reference = _reference('torch_fidelity.feature_extractor_inceptionv3')
  path = tmp_path_factory.mktemp('inception') / 'weights.pth'
  given, torch.load = torch.load, lambda *_, **__: None
  extractor = reference.FeatureExtractorInceptionV3
  load, extractor.load_state_dict = extractor.load_state_dict, lambda *_: None
  try:
    torch.manual_seed(0)
    network = extractor(
      'x', ['2048', 'logits'], feature_extractor_weights_path=''
    )
  finally:
    torch.load, extractor.load_state_dict = given, load
  for weight in network.parameters():
    if weight.ndim == 4:  # else the signal dies out on its way
      torch.nn.init.kaiming_normal_(weight)
  torch.save(network.state_dict(), path)
  return str(path), network


def test_inception_is_that_of_torch_fidelity(random_inception):
  torch = _reference('torch')
  path, reference = random_inception
  pictures = [_picture(i) for i in range(2)]
  found = inception.Inception(path)(pictures)
  batch = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())
  for ours, want in zip(found, reference(batch), strict=True):
    assert want.std() > 0.05
    np.testing.assert_allclose(ours, want.numpy(), rtol=1e-4, atol=1e-4)
  clean, _ = inception.Inception(path, 'clean')([pictures[0]])
  assert np.abs(clean - found[0][:1]).max() > 1e-3 * np.abs(clean).max()


def test_inception_score_counts_its_samples():
  _reference('torch_fidelity')
  sure = 50 * np.eye(20, 1008, dtype=np.float32)
  mean, deviation = inception.inception_score(sure, splits=2)
  # Ten classes in each half, each sure.
  assert mean == pytest.approx(10, rel=1e-3)
  assert deviation == pytest.approx(0, abs=1e-3)
  with pytest.raises(ValueError, match='IS of 20 samples in 30 splits'):
    inception.inception_score(sure, splits=30)


def test_wrong_weights_are_told(tmp_path):
  torch = _reference('torch')
  path = str(tmp_path / 'other.pth')
  torch.save({'features.0.weight': torch.zeros(2)}, path)
  _reference('lpips')
  with pytest.raises(ValueError, match='lacks 50 of 50 tensors'):
    lpips.Lpips(path)
  with pytest.raises(ValueError, match='no such file; accepted: the ImageNet'):
    lpips.Lpips('nowhere')
  with pytest.raises(ValueError, match='accepted: tf1, clean'):
    inception.Inception(path, 'area')


def test_lpips_is_that_of_the_package(tmp_path):
  torch = _reference('torch')
  package = _reference('lpips')
  reference = package.LPIPS(net='squeeze', pnet_rand=True, verbose=False)
  state = {
    f'features.{name.partition(".")[2]}': tensor
    for name, tensor in reference.net.state_dict().items()
  }
  path = str(tmp_path / 'squeeze.pth')
  torch.save({**state, 'classifier.1.weight': torch.zeros(1)}, path)
  a, b = _picture(0, 64, 64), _picture(1, 64, 64)
  tensors = [
    torch.from_numpy(x.transpose(2, 0, 1)[None] / 127.5 - 1).float()
    for x in (a, b)
  ]
  want = float(reference(*tensors))
  assert want > 1e-3
  assert lpips.Lpips(path)(a, b) == pytest.approx(want, rel=1e-5)


_CLIP = CLIPConfig(
  CLIPVisionConfig(patch=14, width=48, depth=3, heads=4, hidden=96, table=4),
  CLIPTextConfig(vocab=99, length=20, width=32, depth=3, heads=4, hidden=64),
  joint=24,
)


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  """CLIP's special tokens and a few words, as a tokenizer.json."""
  tokenizers = _reference('tokenizers')
  words = ['a', 'cat', 'dog', '[UNK]']
  vocab = {w: i for i, w in enumerate(words)}
  vocab |= {'<|startoftext|>': 97, '<|endoftext|>': 98}
  model = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token='[UNK]')
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  folder = tmp_path_factory.mktemp('vocab')
  model.save(str(folder / 'tokenizer.json'))
  return str(folder)


def test_clip_similarity(golden, vocabulary, tmp_path):
  tensors, _ = golden('clip')
  params = clip_names.convert(_CLIP, tensors)
  save_artifact(tmp_path / 'clip', 'clip', _CLIP, params)
  picture = _picture(0, 56, 80)
  [found] = clip.ClipSimilarity(str(tmp_path / 'clip'), vocabulary)(
    [picture], 'a cat'
  )
  ids = np.full((1, 20), 98, np.int32)
  ids[0, :3] = 97, 0, 1
  seen = clip.prepare(picture, 56)[None]
  # 80 x 56 is not resized, so its centre is what the network sees.
  middle = picture[:, 12:68].astype(np.float32) / 255
  mean = np.array([0.48145466, 0.4578275, 0.40821073])
  np.testing.assert_allclose(
    seen[0] * [0.26862954, 0.26130258, 0.27577711] + mean, middle, atol=1e-6
  )

  def embed(x, method):
    return CLIP(_CLIP).apply({'params': params}, jnp.asarray(x), method=method)

  cosine = float(embed(seen, 'embed_images')[0] @ embed(ids, 'embed_text')[0])
  assert found == pytest.approx(100 * max(cosine, 0), abs=1e-3)


def test_clip_keeps_the_end_of_a_long_text(vocabulary):
  ids = clip.ClipText(vocabulary, length=5)('a cat a dog a cat')
  assert ids.tolist() == [97, 0, 1, 0, 98]
  with pytest.raises(ValueError, match="'nowhere': no such file; accepted"):
    clip.ClipText('nowhere')


def test_clip_resizes_the_shorter_side():
  gradient = np.zeros((30, 60, 3), np.uint8)
  gradient[..., 0] = np.linspace(0, 255, 60).astype(np.uint8)
  found = clip.prepare(gradient, 15)
  want = np.asarray(
    Image.fromarray(gradient).resize((30, 15), Image.Resampling.BICUBIC)
  )[:, 7:22]
  assert found.shape == (15, 15, 3)
  back = found[..., 0] * 0.26862954 + 0.48145466
  np.testing.assert_allclose(back, want[..., 0] / 255, atol=1e-6)


def test_structure_sees_pixels_of_0_to_255(golden, tmp_path):
  tensors, _ = golden('vit')
  network = ViTConfig(
    patch=8, width=36, depth=4, heads=3, table=8, norm_eps=1e-12, pooler=True
  )
  params = vit_names.convert(network, tensors)
  params.pop('pooler')
  cfg = encoder_around(network, normalize='imagenet')
  save_artifact(tmp_path / 'dino', 'encoder', cfg, {'network': params})
  measure = structure.Structure(str(tmp_path / 'dino'))
  a, b = _picture(0, 224, 224), _picture(1, 224, 224)
  assert measure(a, a) == 0

  def keys(x):
    mean, std = (
      np.array(v, np.float32) for v in structure.NORMALIZE['imagenet']
    )
    seen = jnp.asarray((x[None] - mean) / std)
    net = structure.ViT(cfg.network())
    call = jax.jit(lambda p, s: net.apply({'params': p}, s, method='last_keys'))
    return call(params, seen)

  want = float(structure.key_distance(keys(a), keys(b))[0])
  assert measure(a, b) == pytest.approx(want, rel=1e-3)
  assert want > 0
