"""Ratios, the sizes that they give, and configs that cannot have them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scar_jax.config import check, default_config
from scar_jax.data.aspects import bucket_sizes, nearest_bucket, read_ratio

ALL = ('1:1', '4:3', '3:4', '3:2', '2:3', '16:9', '9:16')


@pytest.mark.parametrize(
  'text', ['', '4', '4:0', '-4:3', '4:3:2', 'wide', '4/3']
)
def test_what_is_no_ratio_is_named(text):
  with pytest.raises(ValueError, match='is no ratio; accepted: WIDTH:HEIGHT'):
    read_ratio(text)


def test_the_sizes_of_the_usual_ratios():
  assert read_ratio(' 2.39:1') == 2.39
  assert bucket_sizes(ALL, 512, 32) == (
    (512, 512), (448, 576), (576, 448), (416, 608), (608, 416), (384, 672),
    (672, 384),
  )  # fmt: skip
  assert bucket_sizes(('1:1', '4:1', '1:4'), 8, 4) == ((8, 8), (4, 16), (16, 4))


@settings(deadline=None, max_examples=60)
@given(
  st.integers(1, 64), st.integers(1, 64), st.integers(2, 40), st.integers(1, 40)
)
def test_sizes_are_whole_steps_and_never_above_the_square(w, h, side, step):
  [size] = bucket_sizes((f'{w}:{h}',), side * step, step)
  rows, columns = (s // step for s in size)
  assert size == (rows * step, columns * step)
  assert min(rows, columns) >= 1
  assert rows * columns <= side**2
  [turned] = bucket_sizes((f'{h}:{w}',), side * step, step)
  assert turned == size[::-1]
  if w == h:
    assert size == (side * step,) * 2

  def left(r, c):
    return -abs(math.log(c / r * h / w)) + math.log(r * c / side**2)

  every = (
    left(r, c) for r in range(1, side**2 + 1) for c in (1, side**2 // r, side)
    if r * c <= side**2
  )  # fmt: skip
  assert left(rows, columns) >= max(every) - 1e-6


def test_two_ratios_of_one_size_and_steps_that_do_not_divide():
  with pytest.raises(ValueError, match=r'1:1 and 5:4 both .* 256x256 pixels'):
    bucket_sizes(('1:1', '4:3', '5:4'), 256, 64)
  with pytest.raises(ValueError, match=r'aspect_step=24 does not div.*=256'):
    bucket_sizes(('1:1',), 256, 24)


def test_a_picture_goes_to_the_nearest_ratio():
  sizes = bucket_sizes(('1:1', '2:1', '1:2'), 512, 32)
  pictures = [(7, 7), (10, 13), (10, 15), (40, 10), (3, 1000), (0, 0)]
  found = nearest_bucket(sizes, np.array(pictures))
  assert found.tolist() == [0, 0, 1, 2, 1, 0]


@pytest.mark.parametrize(
  ('task', 'fields', 'reason'),
  [
    (
      'scar',
      {'order.name': 'scale'},
      "order.name='scale', whose scales",
    ),
    ('scar', {'model.cond_dropout': 'joint'}, 'null prefix of one shape'),
    (
      'scar',
      {'data.source': 'cache'},
      'data.source=cache, whose rows',
    ),
    (
      'scar',
      {'data.mixture': ({'source': 'jsonl'},)},
      'data.mixture; acc',
    ),
    ('tokenizer', {}, "task='tokenizer', which trains on squares"),
    ('scar', {'data.aspects': '1:1,1.02:1'}, 'both give .* 512x512 pix'),
    ('scar', {'data.aspects': '1:1,wide'}, "'wide' is no ratio"),
  ],
)
def test_configs_that_cannot_be(task, fields, reason):
  raw = default_config(task)
  raw.data.aspects = ALL
  raw.data.image_size = 512
  check(raw) if task == 'scar' else None
  for name, value in fields.items():
    section, field = name.split('.')
    with raw.unlocked(), raw.ignore_type():
      raw[section][field] = value
  with pytest.raises(ValueError, match=reason):
    check(raw)
