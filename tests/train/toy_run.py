"""Configs and runs of the toy task, for tests in and out of this process."""

import dataclasses
import sys

from toy import ToyConfig, ToyLoader, ToyTask

from scar_jax import config as config_lib
from scar_jax.train.loop import train


def toy_config(**changes):
  """`toy_config(steps=4, fsdp=2, batch=8)`: fields by their bare name."""
  parts = {
    'data': config_lib.DataConfig(batch=8, image_size=4),
    'mesh': config_lib.MeshConfig(),
    'optim': config_lib.OptimConfig(lr=1e-2),
    'train': config_lib.TrainConfig(
      steps=4, log_every=1, save_every=2, picture_every=0, ema=0.9
    ),
  }
  for name, value in changes.items():
    for key, part in parts.items():
      if hasattr(part, name):
        parts[key] = dataclasses.replace(part, **{name: value})
        break
    else:
      raise KeyError(name)
  return config_lib.Config(
    task='toy', seed=0, init_from='', model=ToyConfig(), loss=None, **parts
  )


def toy_train(workdir, bad=(), init_from='', **changes):
  config = dataclasses.replace(toy_config(**changes), init_from=str(init_from))
  loader = ToyLoader(batch=config.data.batch, bad=bad)
  return train(config, workdir, ToyTask(), loader)


if __name__ == '__main__':
  sys.modules['tensorboardX'] = None  # done without; it imports a lot
  toy_train(sys.argv[1], steps=int(sys.argv[2]), save_every=int(sys.argv[3]))
