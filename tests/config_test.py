"""Configs: every field is judged, and every config file is valid."""

import itertools
import json

import numpy as np
import pytest

from configs import finetune, imagenet, openmoji, scenes, t2i512
from scar_jax import config as config_lib
from scar_jax.config import batch_per_device, check, default_config
from scar_jax.config_values import read_value
from scar_jax.data.sources import make_source
from scar_jax.train.tasks.tokenizer import model_config


def _raw(**fields):
  raw = default_config('scar').to_dict()
  for key, value in fields.items():
    section, name = key.split('__')
    raw[section][name] = value
  return raw


def test_defaults_survive_text_and_json():
  config = check(default_config('scar'))
  assert check(json.loads(config_lib.to_json(config))) == config


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'optim__learning_rate': 1e-4}, "no field 'optim.learning_rate'"),
    ({'optim__lrr': 1e-4}, "'optim.lrr'. Did you mean 'lr'?"),
    ({'optim__lr': '1e-4x'}, "optim.lr='1e-4x' is not a number"),
    ({'optim__lr': 'nan'}, "optim.lr='nan' is not a finite number"),
    ({'optim__lr': True}, 'optim.lr=True is not a number'),
    ({'data__batch': -3}, 'data.batch=-3 is below the least accepted, 1'),
    ({'data__batch': 2.0}, 'data.batch=2.0 is not a whole number'),
    ({'data__batch': '1.5'}, "data.batch='1.5' is not a whole number"),
    ({'model__dtype': 'bf61'}, 'accepted: float32, bfloat16'),
    ({'prefix__k': 3}, 'prefix.k=3; accepted: 1, 2, 4'),
    ({'data__source': False}, 'put it in quotes'),
    ({'train__resume': 'maybe'}, "train.resume='maybe' is not true or false"),
    ({'train__ema': 1.5}, 'train.ema=1.5 is above the most accepted, 1.0'),
    ({'optim__group_lr': 'a=b'}, "'b' is not a number"),
  ],
)
def test_a_wrong_field_is_named_with_what_is_accepted(fields, message):
  with pytest.raises(ValueError) as error:
    check(_raw(**fields))
  assert message in str(error.value)


def test_unknown_sections_and_tasks_are_named():
  with pytest.raises(ValueError, match=r"'modle'\. Did you mean 'model'"):
    check(_raw() | {'modle': {}})
  with pytest.raises(ValueError, match='must be a section'):
    check(_raw() | {'model': 3})
  with pytest.raises(ValueError, match='task is missing'):
    check({})


def test_values_that_yaml_readers_leave_as_text():
  # The YAML of case C24, as PyYAML hands it over: `1e-4` stays text there.
  raw = _raw(
    optim__lr='1e-4',
    train__steps='1_000',
    train__resume=False,
    optim__warmup_steps=0,
  )
  config = check(raw)
  assert config.optim.lr == 1e-4
  assert config.train.steps == 1000
  assert config.train.resume is False
  # `name: 0123` has become the number 83.
  with pytest.raises(ValueError, match='put it in quotes'):
    check(_raw(data__path=83))
  with pytest.raises(ValueError, match=r"steps='0123' is not a whole"):
    check(_raw(train__steps='0123'))


@pytest.mark.parametrize(
  ('kind', 'text', 'value'),
  [
    (tuple[int, ...], '1,2', (1, 2)),
    (tuple[int, ...], '(1, 2)', (1, 2)),
    (tuple[str, ...], '', ()),
    (tuple[tuple[str, float], ...], 'a=1', (('a', 1.0),)),
    (float | None, 'none', None),
    (float | None, '0.5', 0.5),
    (bool, 'Off', False),
  ],
)
def test_texts_of_lists_and_pairs(kind, text, value):
  assert read_value('field', kind, text) == value


def test_batches_of_case_c26(case):
  for row in json.loads(case('c26_batches.json').read_text()):
    if 'eval_items' in row:
      continue  # tests/data/pipeline_test.py
    args = (row['global_batch'], row['devices'])
    more = {k: row[k] for k in ('accum', 'hosts') if k in row}
    if row['expect'].startswith('ok'):
      assert batch_per_device(*args, **more) == 1
      continue
    with pytest.raises(ValueError) as error:
      batch_per_device(*args, **more)
    message = str(error.value)
    if row['global_batch'] == 10:
      assert 'is not a multiple of the 4 devices' in message
      assert '(8 or 12 would be)' in message
    elif row['global_batch'] == 2:
      assert '(4 would be)' in message
    elif 'accum' in row:
      assert '8/(4*3)' in message
    else:
      assert '4 devices are not a multiple of 3 hosts' in message


def test_a_tensor_axis_that_would_cut_a_head_lists_what_fits():
  with pytest.raises(ValueError, match='accepted: 1, 2, 3, 6'):
    config_lib.check_tensor_axis(4, 6)


def test_differences_name_both_values():
  a, b = _raw(), _raw(optim__lr=1.0, data__batch=3)
  del b['seed']
  assert config_lib.differences(a, b) == [
    'data.batch: 64 -> 3',
    'optim.lr: 0.0001 -> 1.0',
    "seed: 0 -> '(absent)'",
  ]


@pytest.mark.parametrize(
  ('module', 'stage'),
  [(module, stage) for module in (openmoji, scenes) for stage in module.KINDS],
)
def test_every_word_of_the_config_files_is_a_valid_config(module, stage):
  seen = set()
  switches = 'smoke', 'full', 'no_source', 'no_text'
  for count in range(3):
    for words in itertools.combinations(switches, count):
      config = check(module.get_config(','.join((stage, *words))))
      seen.add(config_lib.to_json(config))
  # The conditions are SCAR's alone; smoke is smoke, `full` or not.
  assert len(seen) == (3 if stage in ('tokenizer', 'encoder') else 10)


@pytest.mark.parametrize(
  ('words', 'pixels'),
  [
    ('edit', 36),
    ('edit,full', 48),
    ('edit, full', 48),
    ('edit,full=true', 48),
    ('edit,full,res=36', 36),
    ('edit,full,smoke', 36),
  ],
)
def test_full_drawings_are_larger(words, pixels):
  config = openmoji.get_config(words)
  assert config.data.image_size == pixels
  full = 'full' in words and 'smoke' not in words
  assert config.sample.mean_code == full


@pytest.mark.parametrize(
  ('module', 'sides'),
  [(openmoji, (12, 12)), (scenes, (8, 8))],
)
def test_the_scale_order_has_a_tokenizer_of_its_own(module, sides):
  config = check(module.get_config('tokenizer,order=scale'))
  assert config.model.patch_nums == sides
  tokenizer = model_config(config.model)
  assert tokenizer.image_size == config.data.image_size
  assert check(module.get_config('edit,order=scale')).order.name == 'scale'
  assert _tokenizer(module).model.patch_nums == ()


def _tokenizer(module):
  return check(module.get_config('tokenizer'))


@pytest.mark.parametrize('module', [openmoji, scenes])
def test_no_instruction_of_the_embedded_data_is_cut(module):
  config = check(module.get_config('edit'))
  source = make_source(config.data, 'train')
  longest = max(
    len(source.load(i, np.random.default_rng(i)).text.encode())
    for i in range(400)
  )
  assert longest + 1 <= config.text.length


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('edti', "'edti' is unknown. Did you mean 'edit'?"),
    ('edit,control', 'names two variants'),
    ('edit,res', "'res' needs a value"),
    ('edit,res=big', "'big' is not a whole number"),
    ('edit,resolution=64', "'resolution=64' is unknown"),
  ],
)
def test_wrong_config_arguments_are_named(arg, message):
  with pytest.raises(ValueError) as error:
    openmoji.get_config(arg)
  assert message in str(error.value)


@pytest.mark.parametrize(
  ('arg', 'order', 'size', 'drop_path'),
  [
    ('', 'raster', 'L', 0.0),
    ('size=d20,control=depth+hed', 'scale', 'd20', 0.1 * 20 / 24),
    ('size=d16,smoke', 'scale', 'tiny', 0.1 * 16 / 24),
    ('order=random', 'random', 'L', 0.0),
  ],
)
def test_the_recipes_of_imagenet(arg, order, size, drop_path):
  config = check(imagenet.get_config(arg))
  assert (config.order.name, config.model.size) == (order, size)
  assert config.model.drop_path == pytest.approx(drop_path)
  assert config.text.kind == 'label'
  dropped = 0.0 if order == 'scale' else 0.1
  assert config.model.resid_dropout == config.model.token_dropout == dropped
  assert ('hed' in config.data.control) == ('hed' in arg)
  if 'smoke' not in arg:
    assert config.train.steps == (50_045 if order == 'scale' else 100_091)


def test_the_recipes_of_multigen():
  for control in t2i512.CONTROLS:
    config = check(t2i512.get_config(f'control={control},order=random'))
    assert config.data.kind == control
    assert config.data.control == ()
  drawn = check(t2i512.get_config('control=canny,drawn,smoke'))
  assert drawn.data.control == ('canny',)
  with pytest.raises(ValueError, match="control='edge'; accepted: depth, hed"):
    t2i512.get_config('control=edge')


def test_the_recipe_for_own_pictures():
  for arg, kind, control in (
    ('edit', 'edit', ()),
    ('control', 'control', ()),
    ('control,draw=canny+lineart', 'image', ('canny', 'lineart')),
  ):
    config = check(finetune.get_config(arg))
    assert (config.data.source, config.data.kind) == ('jsonl', kind)
    assert config.data.control == control
    assert (config.data.mixture, config.optim.lr) == ((), 2e-5)
  small = check(finetune.get_config('edit,smoke,order=random'))
  assert (small.order.name, small.train.steps) == ('random', 20)
  with pytest.raises(ValueError, match='accepted: control,draw='):
    finetune.get_config('edit,draw=canny')
