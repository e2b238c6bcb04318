import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.models.tokenizers import codebook

KEY = jax.random.key(0)


# Op by op would compile far more.
update_usage = jax.jit(codebook.update_usage, static_argnums=5)


def update(usage, ids, valid=None, window=4):
  ids = jnp.asarray(ids).reshape(len(ids), 1, -1)
  latent = jnp.stack([ids, -ids], -1).astype(jnp.float32)
  return update_usage(usage, ids, latent, valid, KEY, window)


def test_counts_decay_and_idle_batches_add_up():
  usage = codebook.init_usage(4, 2)
  usage = update(usage, [[0, 0], [1, 0]])
  np.testing.assert_array_equal(usage['count'], [3, 1, 0, 0])
  np.testing.assert_array_equal(usage['idle'], [0, 0, 1, 1])
  usage = update(usage, [[3, 3], [3, 3]])
  np.testing.assert_array_equal(usage['count'], [2.25, 0.75, 0, 4])
  np.testing.assert_array_equal(usage['idle'], [1, 1, 2, 0])
  metrics = codebook.usage_metrics(usage, 4)
  assert metrics['code_usage'] == 0.75
  p = np.array([2.25, 0.75, 4]) / 7
  want = np.exp(-(p * np.log(p)).sum())
  np.testing.assert_allclose(metrics['code_perplexity'], want, rtol=1e-5)


def test_padding_rows_are_neither_counted_nor_drawn():
  usage = codebook.init_usage(8, 2)
  valid = jnp.array([True, False])
  usage = update(usage, [[1, 2], [5, 6]], valid)
  np.testing.assert_array_equal(usage['count'], [0, 1, 1, 0, 0, 0, 0, 0])
  assert set(np.unique(usage['pool'][:, 0])) == {1.0, 2.0}
  # Nothing valid at all must not produce a NaN.
  usage = update(usage, [[1, 2], [5, 6]], jnp.array([False, False]))
  assert np.isfinite(usage['pool']).all()


def test_the_pool_holds_each_kind_of_latent_about_as_often():
  usage = codebook.init_usage(64, 2)
  common = np.ones((1, 990), int)
  rare = np.arange(2, 12)[None]
  for _ in range(3):
    usage = update(usage, np.concatenate([common, rare], axis=1))
    usage = {**usage, 'step': usage['step'] + 1}
  newest = np.asarray(usage['pool'][:64, 0])
  assert set(newest) >= set(range(1, 12)) - {5}
  assert (newest == 1).mean() < 0.3
  # One batch of 64 after the other; the first one filled it.
  np.testing.assert_array_equal(usage['pool'][64:128, 0], newest)
  assert set(np.asarray(usage['pool'][-64:, 0])) <= set(range(1, 12))


def test_dead_codes_move_onto_latents_and_live_ones_stay():
  usage = update(codebook.init_usage(4, 2), [[1, 1], [2, 2]])
  usage['idle'] = jnp.array([3, 2, 9, 0])
  codes = jnp.full((4, 2), 7.0)
  args = (codes, usage, 3, jnp.array(True), KEY)
  moved, after = jax.jit(codebook.revive, static_argnums=2)(*args)
  again, _ = codebook.revive(*args)
  np.testing.assert_array_equal(moved, again)
  assert set(map(tuple, np.asarray(moved)[[0, 2]])) <= {(1, -1), (2, -2)}
  np.testing.assert_array_equal(moved[jnp.array([1, 3])], 7.0)
  np.testing.assert_array_equal(after['idle'], [0, 2, 0, 0])
  same, after = codebook.revive(codes, usage, 3, jnp.array(False), KEY)
  np.testing.assert_array_equal(same, codes)
  np.testing.assert_array_equal(after['idle'], 0)


def test_kmeans_finds_separate_clusters():
  centres = np.array([[10, 0], [0, 10], [-10, 0]], np.float32)
  noise = np.random.default_rng(0).standard_normal((60, 2)) / 10
  pool = jnp.asarray(np.tile(centres, (20, 1)) + noise)
  kmeans = jax.jit(codebook.kmeans, static_argnums=(1, 2, 3))
  found = kmeans(pool, 3, 10, False, jax.random.key(2))
  gaps = np.linalg.norm(found[:, None] - centres, axis=-1).min(1)
  # Random starts may share a cluster, but every centre lies on one.
  assert (gaps < 3).all()
  unit = kmeans(pool, 3, 2, True, jax.random.key(2))
  np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, rtol=1e-5)
