"""What the sweeps share: where they run, what they are scored on.

In: the argument after the colon of `--sweep=FILE:ARG`: `scenes` (the default,
hours on two cores), `openmoji`, or `paper` (512 pixels, one epoch of
MultiGen-20M, on a pod); `smoke` makes every run seconds long; `control=` of the
paper's sweeps. Out: a ConfigDict for `scar_jax/sweep/spec.py`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import parse_arg

SETUPS = ('scenes', 'openmoji', 'paper')
# One epoch of 2.8 million pictures in batches of 64, as the paper's ablations.
_EPOCH = 43_750
_MEASURES = {
  'scenes': (
    dict(key='held_out.exact', title='exact'),
    dict(key='held_out.changed_exact', title='edit right'),
    dict(key='held_out.kept_exact', title='rest right'),
    dict(key='held_out.background_psnr', title='background dB', digits=2),
  ),
  'openmoji': (
    dict(key='new_emoji.tone_accuracy', title='tone right'),
    dict(key='new_emoji.background_psnr', title='background dB', digits=2),
    dict(key='new_edit.tone_accuracy', title='tone right, seen emoji'),
  ),
  'paper': (dict(key='val.fid', title='FID', better='down', digits=2),),
}
# Converted checkpoints of the paper's sweeps, see configs/t2i512.py.
_ARTIFACTS = (
  ('tokenizer.artifact', 'artifacts/vq16_t2i'),
  ('encoder.artifact', 'artifacts/dinov2_b'),
  ('text.artifact', 'artifacts/t5'),
  ('text.vocab', 'artifacts/t5'),
  ('init_from', 'artifacts/t2i_xl'),
)
_PAPER_COLUMNS = (
  ('HED FID', 'down'), ('HED SSIM', 'up'), ('depth FID', 'down'),
)  # fmt: skip


def given(arg: str | None) -> ConfigDict:
  """Reads the argument; see the module."""
  return parse_arg(arg, SETUPS, smoke=False, control='hed', order='raster')


def base(
  arg: str | None, title: str, paper: dict[str, tuple] | None = None
) -> ConfigDict:
  """A sweep without points.

  Args:
    arg: see the module.
    title: of the table.
    paper: rows of the paper's ablation, in its columns.
  """
  words = given(arg)
  setup = words.variant
  sweep: dict[str, Any] = dict(title=f'{title} ({setup})', seeds=(0, 1, 2))
  if setup == 'paper':
    smoke = ',smoke' if words.smoke else ''
    sweep.update(
      config=f'configs/t2i512.py:control={words.control},'
      f'order={words.order}{smoke}',
      set=(*_ARTIFACTS, ('train.steps', 20 if words.smoke else _EPOCH)),
      score=(
        '--suite=fid', '--splits=val', '--resize=clean',
        '--inception=artifacts/inception.pth',
      ),
      seeds=(0,),
    )  # fmt: skip
  else:
    tail = f'{_order(words.order)}{",smoke" if words.smoke else ""}'
    sweep.update(
      config=f'configs/{setup}.py:edit{tail}',
      stages=(
        stage(setup, 'tokenizer', tail), stage(setup, 'encoder', tail),
      ),
      set=(
        ('tokenizer.artifact', '{tokenizer}'),
        ('encoder.artifact', '{encoder}'),
      ),
      score=(f'--suite={setup}', f'--limit={8 if words.smoke else 400}'),
    )  # fmt: skip
  sweep['measures'] = _MEASURES[setup]
  if paper:
    sweep.update(paper=tuple(paper.items()), paper_columns=_PAPER_COLUMNS)
  return ConfigDict(sweep)


def encoder(arg: str | None) -> str:
  """`encoder.artifact` of a point that has one, beside points without."""
  if given(arg).variant == 'paper':
    return dict(_ARTIFACTS)['encoder.artifact']
  return '{encoder}'


def stage(
  setup: str, kind: str, tail: str = '', name: str = '', **fields: Any
) -> dict[str, Any]:
  """A tokenizer or encoder that points build on.

  Args:
    setup: 'scenes' or 'openmoji'.
    kind: variant of the config file.
    tail: more words behind it.
    name: of the stage; the kind by default.
    **fields: overrides, `section__field=value`.
  """
  return dict(
    name=name or kind,
    config=f'configs/{setup}.py:{kind}{tail}',
    set=tuple((k.replace('__', '.'), v) for k, v in fields.items()),
  )


def _order(name: str) -> str:
  return '' if name == 'raster' else f',order={name}'
