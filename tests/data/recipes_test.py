"""Every recipe of the paper: one step on small files in the format of its data.

Networks have the sizes that `smoke` names, with random weights.
"""

import jax
import numpy as np
import pytest
import source_files as files

from configs import edit512, finetune, imagenet, t2i512
from scar_jax import config as config_lib
from scar_jax import sharding
from scar_jax.artifacts import Artifact
from scar_jax.data import text as text_lib
from scar_jax.data.text import ByteText
from scar_jax.plan.networks import abstract_artifacts
from scar_jax.train import inputs
from scar_jax.train import state as state_lib
from scar_jax.train.optim import make_optimizer
from scar_jax.train.step import make_step
from scar_jax.train.tasks import make_task


def _ip2p_magicbrush(root, some):
  files.parquet(root / 'instructpix2pix', some)
  files.parquet(root / 'magicbrush', some, ('source_img', 'target_img'))


RECIPES = [
  (imagenet, 'size=L,control=canny', files.imagefolder),
  (imagenet, 'size=d16,control=lineart', files.imagefolder),
  (t2i512, 'control=canny', files.multigen),
  (edit512, 'unsplash', files.seed_edit),
  (edit512, 'ip2p_magicbrush', _ip2p_magicbrush),
  (finetune, 'edit', files.jsonl),
  (finetune, 'control,draw=canny', files.jsonl),
]


@pytest.mark.parametrize(('recipe', 'arg', 'write'), RECIPES)
def test_a_recipe_can_be_planned_at_full_size(recipe, arg, write):
  config = config_lib.check(recipe.get_config(arg))
  task = make_task(config, abstract_artifacts(config))
  assert set(task.frozen) >= {'tokenizer', 'encoder'}
  assert sum(task.flops(config.data.batch).values()) > 1e12
  assert 'scar train --config=' in recipe.__doc__
  assert 'GB' in recipe.__doc__ or 'MB' in recipe.__doc__


@pytest.mark.slow
@pytest.mark.parametrize(('recipe', 'arg', 'write'), RECIPES)
def test_a_recipe_takes_a_step(recipe, arg, write, tmp_path, monkeypatch):
  raw = recipe.get_config(f'{arg},smoke')
  write(tmp_path / 'data', files.rows(5))
  raw.data.update(dict(path=str(tmp_path / 'data'), batch=4))
  raw.model.update(dict(width=16, layers=1, heads=2))
  if raw.text.kind == 't5':
    raw.text.size += ',width=16,heads=2,head_dim=8,ffn=16,vocab=300'
  config = config_lib.check(raw)
  # No vocabulary file: bytes are ids of any T5.
  monkeypatch.setattr(text_lib, 'make_text', lambda cfg: ByteText(cfg.length))
  rng = np.random.default_rng(0)

  def drawn(shape):
    return 0.05 * rng.standard_normal(shape.shape).astype(np.float32)

  artifacts = {
    name: Artifact(
      name, part.config, jax.tree.map(drawn, part.params), 'none', {}, ''
    )
    for name, part in abstract_artifacts(config).items()
  }
  task = make_task(config, artifacts)
  batch = next(inputs.make_loader(config))
  assert batch['valid'].all()
  variables = sharding.unbox(
    jax.eval_shape(task.init, jax.random.key(0), batch)
  )
  params = jax.tree.map(drawn, variables['params'])
  tx = make_optimizer(
    config.optim, config.train.steps, params, task.labels(params)
  )
  state = state_lib.TrainState(
    step=np.int32(0), params=params, opt_state=tx.init(params), ema={},
    extra={}, seed=np.uint32(0), skipped=np.int32(0), bad_in_row=np.int32(0),
  )  # fmt: skip
  step = make_step(task, tx, config.optim, config.train.steps)
  state, metrics = jax.jit(step)(state, task.frozen, batch)
  assert np.isfinite(metrics['loss'])
  assert metrics['skipped'] == 0
  assert metrics['grad_norm'] > 0
