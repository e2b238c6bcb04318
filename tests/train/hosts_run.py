"""`scar` with the toy in place of the task: a model that compiles in a second.

Run by `hosts_test.py` in several processes; all else is the real thing.
"""

import sys

from toy import ToyTask

from scar_jax import cli
from scar_jax.train import tasks

if __name__ == '__main__':
  sys.modules['tensorboardX'] = None  # done without; it imports a lot
  tasks.make_task = lambda config, artifacts: ToyTask()
  sys.exit(cli.main())
