"""Kills `scar sample` again and again, and counts what it leaves.

  python launch/drill.py --workdir=runs/quickstart/edit --out=/tmp/drill

In: a trained model. Writes a file of requests, one in twenty of them bad;
starts two processes on it, kills one at a time without warning, and starts
another in its place. Out: a line of JSON; status 1 unless every good request
was made, once, and every bad one is named.
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image

_BAD = (
  {'image': 'missing.png'},
  {'image': 'broken.png'},
  {'seed': -1},
  {'sed': 1},
)


def write_requests(folder: pathlib.Path, count: int) -> pathlib.Path:
  """Requests on eight noisy pictures of different sizes."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(8):
    pixels = rng.integers(0, 256, (30 + i, 40 - i, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')
  (folder / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
  path = folder / 'requests.jsonl'
  with path.open('w') as file:
    for i in range(count):
      row = {'id': f'r{i:05d}', 'image': f'{i % 8}.png', 'seed': i}
      row['prompt'] = 'make the skin dark'
      if i % 20 == 7:
        row |= _BAD[i // 20 % len(_BAD)]
      file.write(json.dumps(row) + '\n')
  return path


def main() -> int:
  """Runs the drill; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--out', required=True, type=pathlib.Path)
  parser.add_argument('--requests', type=int, default=1000)
  parser.add_argument('--kills', type=int, default=10)
  parser.add_argument('--processes', type=int, default=2)
  given = parser.parse_args()
  path = write_requests(given.out / 'given', given.requests)
  images = given.out / 'images'
  words = [
    *(sys.executable, '-m', 'scar_jax.cli', 'sample', f'--requests={path}'),
    *(f'--workdir={given.workdir}', f'--out={images}'),
  ]
  rng, started = random.Random(0), time.monotonic()

  def start() -> subprocess.Popen:
    return subprocess.Popen(
      words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

  def made() -> int:
    return len(list(images.glob('r*.png'))) if images.is_dir() else 0

  running = [start() for _ in range(given.processes)]
  killed = 0
  good = given.requests - given.requests // 20
  for i in range(given.kills):
    # Spread over the job, however fast it is.
    while made() < good * (i + rng.random()) / (given.kills + 1):
      time.sleep(0.05)
      if all(p.poll() is not None for p in running):
        running[0] = start()
    victim = running.pop(rng.randrange(len(running)))
    killed += victim.poll() is None
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    running.append(start())
  for process in running:
    process.wait()

  def rows(name: str) -> list:
    return [json.loads(x) for x in (images / name).read_text().splitlines()]

  for row in rows('manifest.jsonl'):
    with Image.open(images / row['file']) as image:
      image.load()
  told = {
    'requests': given.requests,
    'killed': killed,
    'images': made(),
    'in_manifest': len({row['id'] for row in rows('manifest.jsonl')}),
    'failed': len(rows('failed.jsonl')),
    'left_behind': len([p for p in images.glob('.*') if '.png' in p.name]),
    'seconds': round(time.monotonic() - started, 1),
  }
  sys.stdout.write(json.dumps(told) + '\n')
  right = told['images'] == told['in_manifest'] == good
  right = right and told['failed'] == given.requests // 20
  return 0 if right and not told['left_behind'] else 1


if __name__ == '__main__':
  sys.exit(main())
