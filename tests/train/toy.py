"""A tiny task for tests of the trainer: a two-layer MLP that redraws images."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from scar_jax.sharding import annotated


@dataclasses.dataclass(frozen=True)
class ToyConfig:
  width: int = 16
  dropout: float = 0.1
  dtype: str = 'float32'


class Mlp(nn.Module):
  cfg: ToyConfig

  @nn.compact
  def __call__(self, x, train: bool):
    cfg = self.cfg
    kernel = nn.initializers.lecun_normal()
    x = x.reshape(x.shape[0], -1)
    size = x.shape[-1]
    x = nn.Dense(
      cfg.width,
      kernel_init=annotated(kernel, 'embed', 'mlp'),
      bias_init=annotated(nn.initializers.zeros, 'mlp'),
      name='up',
    )(x)
    x = nn.Dropout(cfg.dropout, deterministic=not train)(nn.gelu(x))
    return nn.Dense(
      size,
      kernel_init=annotated(kernel, 'mlp', 'embed'),
      bias_init=annotated(nn.initializers.zeros, 'embed'),
      name='down',
    )(x)


class ToyTask:
  """Predicts `target` from `condition`; counts rows in `extra`."""

  name = 'toy'

  def __init__(self, cfg=None):
    self.model = Mlp(cfg or ToyConfig())
    self.frozen = {'scale': {'w': jnp.float32(2.0)}}

  def init(self, rng, batch):
    params = self.model.init(rng, batch['condition'], False)['params']
    return {'params': params, 'usage': {'rows': jnp.zeros((), jnp.float32)}}

  def loss(self, params, extra, frozen, batch, rng, train):
    out = self.model.apply(
      {'params': params}, batch['condition'], train, rngs={'dropout': rng}
    )
    target = batch['target'].reshape(out.shape)
    loss = jnp.mean((out * frozen['scale']['w'] - target) ** 2)
    rows = extra['usage']['rows'] + batch['target'].shape[0]
    return loss, ({'mse': loss}, {'usage': {'rows': rows}})

  def artifact(self, params, extra):
    return 'toy', self.model.cfg, params

  def pictures(self, params, extra, frozen, batch, rng):
    out = self.model.apply({'params': params}, batch['condition'], False)
    image = jnp.clip(out * 127.5 + 127.5, 0, 255).astype(jnp.uint8)
    return {'drawn': image.reshape(batch['target'].shape)}


class ToyLoader:
  """Random images by global index; the state is the next index."""

  def __init__(self, batch=8, size=4, seed=0, start=0, bad=()):
    self.batch, self.size, self.seed, self.next = batch, size, seed, start
    self.bad = bad

  def __iter__(self):
    return self

  def __next__(self):
    index = np.arange(self.next, self.next + self.batch, dtype=np.int32)
    self.next += self.batch
    shape = (self.size, self.size, 3)
    rows = [
      np.random.default_rng([self.seed, i]).uniform(-1, 1, shape) for i in index
    ]
    image = np.stack(rows).astype(np.float32)
    image[[i in self.bad for i in index]] = np.nan
    return {'target': image, 'condition': image[:, ::-1], 'index': index}

  def get_state(self):
    return {'next': self.next}

  def set_state(self, state):
    self.next = state['next']
