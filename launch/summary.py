"""Gathers the files of a quickstart into one metrics.json and a short table.

In: `--out` and the names of the scored runs. Reads `eval_<run>/scores.json`,
and of every stage `seconds` and (of the trained ones) `summary.json`. Out:
`metrics.json` with `seconds` (all stages, set-up excluded), `compilations`
(the most that any stage needed of its training step), `splits` of the first
run, and the splits of every other run under its name.
"""

import argparse
import json
import pathlib
import sys


def gather(out: pathlib.Path, runs: list[str]) -> dict:
  """The content of metrics.json."""
  seconds = {
    p.parent.name: int(p.read_text()) for p in sorted(out.glob('*/seconds'))
  }
  compilations = {
    p.parent.name: json.loads(p.read_text())['compilations']
    for p in sorted(out.glob('*/summary.json'))
  }
  scores = {
    run: json.loads((out / f'eval_{run}' / 'scores.json').read_text())
    for run in runs
  }
  first, *others = runs
  return {
    'seconds': sum(seconds.values()),
    'compilations': max(compilations.values()),
    'splits': scores[first]['splits'],
    **{run: scores[run]['splits'] for run in others},
    'stages': {'seconds': seconds, 'compilations': compilations},
  }


def table(metrics: dict, runs: list[str]) -> str:
  """Fixed-width text: one line per run and split."""
  lines = [f'{"run":<12}{"split":<12}{"n":>5}  tone (ceiling)  background dB']
  for run in runs:
    splits = metrics['splits'] if run == runs[0] else metrics[run]
    for split, s in splits.items():
      lines.append(
        f'{run:<12}{split:<12}{s["n"]:>5}  '
        f'{s["tone_accuracy"]:>6.1%} ({s["tokenizer_tone_accuracy"]:.1%})  '
        f'{s["background_psnr"]:.1f} '
        f'(tokenizer {s["tokenizer_background_psnr"]:.1f})'
      )
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('runs', nargs='+')
  args = parser.parse_args()
  metrics = gather(args.out, args.runs)
  path = args.out / 'metrics.json'
  path.write_text(json.dumps(metrics, indent=1) + '\n')
  sys.stdout.write(
    f'\n{table(metrics, args.runs)}\n\n'
    f'{metrics["seconds"] / 60:.1f} minutes in all, '
    f'{metrics["compilations"]} compilation(s) of a training step\n'
    f'{path}\n{args.out / "grid.png"}\n'
  )


if __name__ == '__main__':
  main()
