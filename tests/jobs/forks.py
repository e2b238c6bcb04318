"""Processes that share a job and are killed; run by work_test.py, without JAX.

Usage: python forks.py REQUESTS OUT KILLS. Prints what was done as JSON.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time
import types

import numpy as np

from scar_jax.jobs.requests import read_requests
from scar_jax.jobs.work import Work


class Stub:
  """Takes a while, and colours a picture by its seed."""

  cfg = types.SimpleNamespace(batch=4)

  def __init__(self, log):
    self.log = log

  def __call__(self, pictures, prompts, *, seed, labels, **_):
    if labels and max(labels) > 9:
      raise ValueError(f'label {max(labels)}; accepted: 0 to 9')
    time.sleep(0.01)
    with open(self.log, 'a') as file:
      file.write(f'{os.getpid()} {json.dumps(seed)}\n')
    return [np.full((8, 8, 3), s % 256, np.uint8) for s in seed]


def work(requests, out):
  """One process, from start to end."""
  good, failed = read_requests(requests)
  job = Work(Stub(out.with_suffix('.log')), out, {'config': 'c'}, {})
  job.run([r for r in good if not job.is_made(r)], lambda count: None)
  return failed | job.failed, job.made


def main():
  """Three processes at a time; whoever is killed is replaced."""
  requests, out = map(pathlib.Path, sys.argv[1:3])
  kills, children, rng = int(sys.argv[3]), [], random.Random(0)

  def start():
    child = os.fork()
    if not child:
      work(requests, out)
      os._exit(0)
    children.append(child)

  for _ in range(3):
    start()
  for _ in range(kills):
    time.sleep(rng.uniform(0.01, 0.06))
    victim = children.pop(rng.randrange(3))
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    start()
  status = [os.waitpid(child, 0)[1] for child in children]
  failed, made = work(requests, out)
  told = {'status': status, 'failed': failed, 'made_at_last': made}
  sys.stdout.write(json.dumps(told))


if __name__ == '__main__':
  main()
