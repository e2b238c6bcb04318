"""`scar convert` from the command line: detection, errors, ways back."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scar_jax import cli
from scar_jax.artifacts import load_artifact
from scar_jax.convert import families
from scar_jax.convert.readers import open_checkpoint

# Fixture -> family, artifact kind, hints that its unpublished size needs.
WHOLE = {
  'vq16': ('llamagen-vq', 'tokenizer', []),
  'gpt_c2i': ('llamagen-gpt', 'scar', ['--heads=4', '--image_size=64']),
  'gpt_t2i': ('llamagen-gpt', 'scar', ['--heads=4', '--image_size=64']),
  'gpt_edit': ('editar', 'scar', ['--heads=4']),
  'scar_prefill': ('scar', 'scar', ['--heads=4']),
  'dinov2_reg': ('dinov2', 'encoder', ['--heads=3']),
  'dinov2_hf': ('dinov2', 'encoder', ['--heads=3']),
  't5': ('t5', 'text', []),
  'var': ('var', 'scar', []),
  'var_vqvae': ('var-vqvae', 'tokenizer', ['--patch_nums=1,2,3,4']),
  'vit': ('vit', 'encoder', ['--heads=3']),
  'clip': ('clip', 'encoder', ['--heads=4']),
  'sam': ('sam', 'encoder', []),
}
SKIPPED = {
  'vq16': {'quantize.codebook_used'},
  'gpt_edit': {'alignment.bias', 'alignment.weight'},
}


def convert(*words):
  return cli.main(['convert', *map(str, words)])


def fails(capsys, *words):
  assert convert(*words) == 1
  return capsys.readouterr().err


def left(folder: pathlib.Path):
  return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize('name', list(WHOLE))
def test_family_and_sizes_are_detected(golden_path, tmp_path, capsys, name):
  family, kind, hints = WHOLE[name]
  path, out = golden_path(f'{name}.safetensors'), tmp_path / 'out'
  report = tmp_path / 'report.json'
  words = (f'--checkpoint={path}', f'--out={out}', f'--json={report}')
  assert convert(*words, *hints) == 0
  said = capsys.readouterr().out
  assert f'{family}, size custom' in said
  assert '0 missing, 0 unexpected, 0 wrong' in said
  artifact = load_artifact(out, kind)
  assert artifact.meta['family'] == family
  written = json.loads(report.read_text())
  assert written['fingerprint'] == artifact.fingerprint
  skipped = set(written['report']['skipped'])
  assert written['report']['used'] + len(skipped) == len(load_file(path))
  for tensor in skipped:
    assert f'  skipped {tensor} ' in said
  assert left(tmp_path) == ['out', 'report.json']


@pytest.mark.parametrize(
  'name', ['vq16', 'gpt_c2i', 'gpt_t2i', 'gpt_edit', 'var', 'var_vqvae']
)
def test_the_way_back_is_exact(golden_path, tmp_path, capsys, name):
  path, hints = golden_path(f'{name}.safetensors'), WHOLE[name][2]
  first, back, second = (tmp_path / n for n in ('a', 'b.safetensors', 'c'))
  assert convert(f'--checkpoint={path}', f'--out={first}', *hints) == 0
  assert convert('--reverse', f'--checkpoint={first}', f'--out={back}') == 0
  state, again = load_file(path), load_file(back)
  assert set(state) - set(again) == SKIPPED.get(name, set())
  for key, value in again.items():
    want = state[key]
    if want.dtype != np.int64:
      want = want.astype(np.float32)
    assert (value.dtype, value.shape) == (want.dtype, want.shape)
    # How often each code was used is no weight: the counts start at 0 again.
    if key != 'quantize.ema_vocab_hit_SV':
      np.testing.assert_array_equal(value, want)
  assert convert(f'--checkpoint={back}', f'--out={second}', *hints) == 0
  marks = {load_artifact(p).fingerprint for p in (first, second)}
  assert len(marks) == 1
  assert left(tmp_path) == ['a', 'b.safetensors', 'c']
  assert 'in the names of' in capsys.readouterr().out


def test_a_way_back_that_does_not_exist(golden_path, tmp_path, capsys):
  path, out = golden_path('t5.safetensors'), tmp_path / 'out'
  assert convert(f'--checkpoint={path}', f'--out={out}') == 0
  words = (
    '--reverse',
    f'--checkpoint={out}',
    f'--out={tmp_path}/b.safetensors',
  )
  assert "--reverse of FAMILY='t5'; accepted: llamagen-vq" in fails(
    capsys, *words
  )
  said = fails(capsys, 'editar', *words)
  assert "came from 't5'; accepted: t5" in said
  said = fails(capsys, '--reverse', f'--checkpoint={out}', f'--out={out}')
  assert 'accepted: a .safetensors file' in said
  assert left(tmp_path) == ['out']


@pytest.mark.parametrize(
  ('name', 'words', 'message'),
  [
    ('vq16', ['t5'], "the file looks like 'llamagen-vq'"),
    ('vq16', ['lamagen-vq'], "Did you mean 'llamagen-vq'?"),
    ('vq16', ['--size=vq8'], "--size='vq8', but "),
    ('vq16', ['--heads=3'], "--heads=3 means nothing for FAMILY='llamagen-vq'"),
    ('gpt_c2i', ['editar'], "the file looks like 'llamagen-gpt'"),
    ('gpt_c2i', [], 'number of heads cannot be detected'),
    ('gpt_c2i', ['--heads=5'], 'heads=5 does not divide width=64'),
    ('gpt_edit', ['--heads=4', '--image_size=512'], 'accepted: 64, as the che'),
    ('dinov2', [], 'width 36 is no multiple of 64'),
    ('gpt_c2i_grads', ['--weights=ema'], 'no weights of --weights=ema'),
  ],
)
def test_what_does_not_fit_is_an_error(
  golden_path, tmp_path, capsys, name, words, message
):
  path = golden_path(f'{name}.safetensors')
  given = (*words, f'--checkpoint={path}', f'--out={tmp_path}/out')
  assert message in fails(capsys, *given)
  assert not left(tmp_path)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('missing', "'output.weight'"),
    ('renamed', "unexpected: ['layers.0.attn.qkv.weight']"),
    ('nan_weight', "with NaN or infinity: ['layers.0.attention_norm.weight']"),
    ('transposed', 'layers.0.attention.wqkv.weight (8, 24)'),
    ('cut_file', 'c22_cut_file.safetensors is no whole safetensors file'),
  ],
)
def test_c22_leaves_nothing_behind(case, tmp_path, capsys, name, message):
  path = case(f'c22_{name}.safetensors')
  words = (f'--checkpoint={path}', f'--out={tmp_path}/out', '--heads=2')
  assert message in fails(capsys, 'llamagen-gpt', *words)
  assert not left(tmp_path)


def test_optimizer_state_needs_a_flag(golden, tmp_path, capsys):
  state = {f'model.{k}': v for k, v in golden('vq8')[0].items()}
  state['optimizer.state.0.exp_avg'] = np.zeros(3, np.float32)
  path, out = tmp_path / 'x.safetensors', tmp_path / 'out'
  save_file(state, path)
  words = (f'--checkpoint={path}', f'--out={out}')
  said = fails(capsys, *words)
  assert "1 unexpected: ['optimizer.state.0.exp_avg']" in said
  assert 'found optimizer.state.0.exp_avg (3,)' in said
  assert left(tmp_path) == ['x.safetensors']
  assert convert(*words, '--allow_unexpected') == 0
  assert 'unexpected optimizer.state.0.exp_avg (3,)' in capsys.readouterr().out


def test_drawn_parameters_are_recorded(golden, tmp_path, capsys):
  state = dict(golden('vq8')[0])
  del state['quant_conv.bias']
  path, out = tmp_path / 'x.safetensors', tmp_path / 'out'
  save_file(state, path)
  words = (f'--checkpoint={path}', f'--out={out}')
  assert 'missing: [' in fails(capsys, *words)
  assert convert(*words, '--allow_missing') == 0
  assert 'drawn at random: quant_conv/bias' in capsys.readouterr().out
  assert load_artifact(out).meta['drawn'] == ['quant_conv/bias']


def test_only_an_artifact_is_replaced(
  golden_path, tmp_path, capsys, monkeypatch
):
  path, out = golden_path('vq8.safetensors'), tmp_path / 'out'
  words = (f'--checkpoint={path}', f'--out={out}')
  out.mkdir()
  (out / 'notes.txt').write_text('mine')
  assert 'exists and is no artifact' in fails(capsys, *words)
  assert left(out) == ['notes.txt']
  (out / 'notes.txt').unlink()
  assert convert(*words) == 0
  mark = load_artifact(out).fingerprint
  assert convert(*words) == 0
  assert load_artifact(out).fingerprint == mark

  def full(*args):
    raise OSError('disk full')

  monkeypatch.setattr('scar_jax.artifacts.write_params', full)
  assert 'disk full' in fails(capsys, *words)
  assert load_artifact(out).fingerprint == mark
  assert left(tmp_path) == ['out']


def test_the_command_line_explains_itself(capsys):
  assert cli.main(['convert', '--help']) == 0
  said = capsys.readouterr().out
  assert 'llamagen-vq, var-vqvae, var, scar, editar' in said
  assert '--allow_missing' in said
  assert '--checkpoint, --out not given' in fails(capsys, 'llamagen-vq')


def test_every_family_has_a_row_and_every_row_a_family(golden_path):
  names = 'llamagen-vq llamagen-gpt editar scar var-vqvae var dinov2 vit clip'
  known = {f.name for f in families.FAMILIES}
  assert known == {*names.split(), 'sam', 't5', 'depth-anything'}
  for fixture, name in {
    **{k: v[0] for k, v in WHOLE.items()},
    'var_shared_aln': 'var',
  }.items():
    state = open_checkpoint(golden_path(f'{fixture}.safetensors'))
    assert families.detect_family(state).name == name
  with pytest.raises(ValueError, match=r"these tensors: 1 .*\['x'\]"):
    families.detect_family(['x'])


def test_the_encoder_inside_a_release(golden_path, tmp_path):
  path = golden_path('scar_prefill.safetensors')
  words = (f'--checkpoint={path}', f'--out={tmp_path}/out', '--heads=2')
  assert convert('dinov2', *words, '--image_size=112') == 0
  cfg = load_artifact(tmp_path / 'out', 'encoder').config
  assert (cfg.normalize, cfg.features) == ('pm1', 'last4')
  assert (cfg.width, cfg.depth, cfg.image_size) == (8, 4, 112)


def test_parts_of_clip_and_pixels_of_a_vit(golden_path, tmp_path, capsys):
  out, clip = tmp_path / 'out', golden_path('clip.safetensors')
  words = (f'--checkpoint={clip}', f'--out={out}', '--text_heads=4')
  assert convert(*words, '--part=text') == 0
  assert load_artifact(out).kind == 'clip_text'
  assert convert(*words, '--part=both', '--heads=4') == 0
  assert load_artifact(out).config.text.heads == 4
  err = fails(capsys, *words, '--part=head')
  assert "part='head'; accepted: vision, text, both" in err
  vit = golden_path('vit.safetensors')
  words = (f'--checkpoint={vit}', f'--out={out}', '--heads=3')
  assert convert(*words, '--normalize=imagenet') == 0
  assert load_artifact(out).config.normalize == 'imagenet'
  err = fails(capsys, *words, '--normalize=zero')
  assert "normalize='zero'; accepted: imagenet, pm1, clip" in err
  assert '--part' in fails(capsys, *words, '--part=text')
