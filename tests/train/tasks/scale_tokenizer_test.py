"""The tokenizer task with a multi-scale tokenizer."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scar_jax import objectives
from scar_jax.models.tokenizers.msvq_config import MSVQConfig
from scar_jax.models.tokenizers.residual import shrink
from scar_jax.train.optim import OptimConfig, make_optimizer
from scar_jax.train.state import TrainState
from scar_jax.train.step import make_step
from scar_jax.train.tasks import tokenizer as tok

TINY = tok.TokenizerModel(
  patch_nums=(1, 2, 4), codes=16, code_dim=4, ch=8, patch=2, phis=2
)


def task_of(model=TINY, size=8, **loss):
  config = types.SimpleNamespace(
    model=model,
    # The perceptual loss is the same code for both tokenizers.
    loss=tok.TokenizerLoss(**{'perceptual': 0.0, **loss}),
    data=types.SimpleNamespace(image_size=size),
  )
  return tok.make_task(config, {})


def batch_of(n=4):
  images = jax.random.uniform(jax.random.key(1), (n, 2, 2, 3), minval=-1)
  return {'target': images.repeat(4, 1).repeat(4, 2)}


@functools.cache
def _fresh():
  return nn.unbox(jax.jit(task_of().init)(jax.random.key(0), batch_of()))


def variables_of():
  """Parameters and the rest, which no weight of a loss changes."""
  variables = dict(_fresh())
  return variables.pop('params'), variables


def test_steps_lower_the_loss_and_fill_the_codebook():
  task, batch = task_of(vq_start=10, kmeans_iters=5, dead_after=10), batch_of(8)
  boxed = jax.eval_shape(task.init, jax.random.key(0), batch)['params']
  params, extra = variables_of()
  optim = OptimConfig(lr=1e-2, weight_decay=0.0)
  tx = make_optimizer(optim, 80, boxed, task.labels(params))
  state = TrainState(
    step=jnp.int32(0), params=params, opt_state=tx.init(params), ema={},
    extra=extra, seed=jnp.uint32(0), skipped=jnp.int32(0),
    bad_in_row=jnp.int32(0),
  )  # fmt: skip
  step = jax.jit(make_step(task, tx, optim, 80))
  seen = []
  for _ in range(80):
    state, metrics = step(state, {}, batch)
    seen.append({k: float(v) for k, v in metrics.items()})
  assert seen[-1]['loss'] < 0.5 * seen[11]['loss']
  assert seen[-1]['psnr'] > seen[11]['psnr'] + 3
  assert seen[-1]['code_usage'] > 0.8


def test_quantiser_terms_are_those_of_var():
  task, batch = task_of(codebook=1.0, commit=0.25), batch_of()
  params, extra = variables_of()
  rng = jax.random.key(0)
  loss = jax.jit(task.loss, static_argnums=5)  # op by op takes far longer
  _, (metrics, _) = loss(params, extra, {}, batch, rng, False)
  out = jax.jit(task.model.apply)({'params': params['vq']}, batch['target'])
  want = objectives.residual_loss(out.raw, out.partial)
  got = metrics['codebook'] + metrics['commit']
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_codes_start_from_residuals_of_unquantised_scales():
  task, batch = task_of(vq_start=3, kmeans_iters=3), batch_of(8)
  params, extra = variables_of()
  loss = jax.jit(
    lambda extra: task.loss(
      params, extra, {}, batch, jax.random.key(0), train=True
    )
  )
  _, (_, extra) = loss(extra)

  @jax.jit
  def run(vq):
    out = task.model.apply({'params': vq}, batch['target'], mix=0.0)
    # What the first scale leaves over when it is not quantised.
    first = out.queries[:, :1]
    return out, task.model.apply({'params': vq}, 0, first, method='spread')

  out, added = run(params['vq'])
  rest = shrink(out.raw - added, 2).reshape(8, 4, 4)
  np.testing.assert_allclose(out.queries[:, 1:5], rest, atol=1e-6)

  def error(x, codes):
    gaps = np.linalg.norm(np.asarray(x)[:, None] - np.asarray(codes), axis=-1)
    return gaps.min(1)

  known = np.asarray(out.queries).reshape(-1, 4)
  assert error(extra['codes']['pool'], known).max() < 1e-5
  update = jax.jit(task.post_update)
  started, _ = update(params, extra, jax.random.key(1), jnp.int32(2))
  before, after = (
    error(known, p['vq']['codebook']).mean() for p in (params, started)
  )
  assert after < 0.8 * before


def test_padding_rows_are_neither_counted_nor_lost_on():
  task, batch = task_of(), batch_of()
  params, extra = variables_of()
  valid = jnp.array([True, True, False, False])
  loss = jax.jit(
    lambda b: task.loss(params, extra, {}, b, jax.random.key(0), True)
  )
  padded = {'target': batch['target'].at[2:].set(0.3), 'valid': valid}
  total, (_, new) = loss(padded)
  alone = {'target': batch['target'][:2], 'valid': valid[:2]}
  np.testing.assert_allclose(total, loss(alone)[0], rtol=1e-5)
  assert new['codes']['count'].sum() == 2 * 21


def test_cut_samples_train_the_first_scales():
  plain, batch = task_of(), batch_of(64)
  params, _ = variables_of()
  cut = task_of(dataclasses.replace(TINY, scale_dropout=0.5))
  assert cut.cfg.scale_dropout == 0.5
  vq = {'params': params['vq']}
  whole = jax.jit(plain.model.apply)(vq, batch['target']).images

  @functools.partial(jax.jit, static_argnums=0)
  def run(deterministic):
    return cut.model.apply(
      vq,
      batch['target'],
      deterministic,
      rngs={'dropout': jax.random.key(3)},
    ).images

  # Two programs: the last bit may differ.
  np.testing.assert_allclose(run(True), whole, atol=1e-5)
  changed = np.abs(run(False) - whole).max(axis=(1, 2, 3)) > 1e-3
  assert 10 < changed.sum() < 40  # half of them, a third of these to the last


def test_the_artifact_has_the_config_of_many_scales():
  task, batch = task_of(), batch_of()
  params, extra = variables_of()
  kind, cfg, exported = task.artifact(params, extra)
  assert kind == 'tokenizer'
  assert isinstance(cfg, MSVQConfig)
  assert (cfg.patch, cfg.skip, cfg.image_size) == (2, True, 8)
  assert {'phi_0', 'phi_1', 'codebook'} <= set(exported)
  key = jax.random.key(0)
  shown = jax.jit(task.pictures)(params, extra, {}, batch, key)
  assert shown['reconstruction'].shape == (4, 8, 8, 3)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'z_channels': 8}, r'model\.z_channels=8 means nothing to a multi-scale'),
    ({'l2_norm': 'on'}, r'model\.l2_norm=True means nothing to a multi-scale'),
    (
      {'patch_nums': (), 'phis': 3},
      r'model\.phis=3 means nothing to a single-.*--config\.model\.patch_nums',
    ),
    ({'patch_nums': (4, 2)}, r'patch_nums=\(4, 2\); accepted: sides from 1'),
    ({'size': 'var9'}, r"'var9'; accepted: \['tiny', 'var1024'"),
  ],
)
def test_a_field_of_the_other_kind_is_an_error(changes, message):
  with pytest.raises(ValueError, match=message):
    tok.model_config(dataclasses.replace(TINY, **changes))


def test_impossible_runs_are_errors():
  with pytest.raises(ValueError, match=r'loss\.entropy=0\.1 with a multi-sc'):
    task_of(entropy=0.1)
  task = task_of(size=16)
  batch = {'target': jnp.zeros((1, 16, 16, 3))}
  with pytest.raises(ValueError, match='16x16; accepted: 8x8, 4 latents of 2'):
    jax.eval_shape(task.init, jax.random.key(0), batch)
