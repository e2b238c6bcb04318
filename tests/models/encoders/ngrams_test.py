"""Hashed n-grams of the byte encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax.data.text import ByteText
from scar_jax.models.encoders.t5 import T5Encoder, hash_ngrams, t5_config

BYTES = ByteText(40)


def _ids(*texts):
  return jnp.asarray(BYTES(texts)[0])


def test_a_row_depends_on_the_last_n_ids_and_on_nothing_else():
  ids = _ids('medium-dark skin', 'make the skin dark')
  rows = hash_ngrams(ids, 4, 4096)
  at = 'medium-dark'.index('dark') + 3, 'make the skin dark'.index('dark') + 3
  assert rows[0, at[0]] == rows[1, at[1]]
  assert rows[0, at[0]] != hash_ngrams(ids, 8, 4096)[0, at[0]]
  assert rows[0, at[0]] != rows[0, at[0] - 1]


def test_the_start_of_a_text_is_unlike_its_middle():
  rows = hash_ngrams(_ids('dark skin', 'a dark skin'), 6, 4096)
  assert rows[0, 3] != rows[1, 5]  # 'dark' after nothing, and after 'a '
  assert rows[0, 8] == rows[1, 10]  # 'k skin' after either


def test_rows_are_spread_over_the_table():
  rng = np.random.default_rng(0)
  ids = jnp.asarray(rng.integers(3, 259, (64, 512)))
  counts = np.bincount(np.ravel(hash_ngrams(ids, 4, 1000)), minlength=1000)
  assert len(counts) == 1000
  # As of a fair die: 32.8 to a row, give or take 5.7.
  assert counts.std() == pytest.approx(32.8**0.5, rel=0.1)


def test_the_encoder_adds_its_tables():
  plain = t5_config('byte', layers=1)
  cfg = dataclasses.replace(plain, ngrams=(4, 8), ngram_rows=512)
  ids = _ids('dark skin')
  params = jax.jit(T5Encoder(cfg).init)(jax.random.key(0), ids)['params']
  assert params['ngrams_8'].value.shape == (512, cfg.width)
  run = jax.jit(T5Encoder(cfg).apply)
  out = run({'params': params}, ids)
  zeros = {f'ngrams_{n}': params.pop(f'ngrams_{n}') for n in cfg.ngrams}
  without = jax.jit(T5Encoder(plain).apply)({'params': params}, ids)
  assert np.abs(out - without).max() > 0.1
  zeros = jax.tree.map(jnp.zeros_like, zeros)
  same = run({'params': {**params, **zeros}}, ids)
  np.testing.assert_array_equal(same, without)


@pytest.mark.parametrize('wrong', [dict(ngrams=(1,)), dict(ngram_rows=0)])
def test_lengths_and_rows_are_checked(wrong):
  with pytest.raises(ValueError, match='accepted: lengths of 2 or more, 1 row'):
    t5_config('byte', **wrong)
