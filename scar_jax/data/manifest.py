"""What a cache of finished rows holds: `manifest.json` beside its shards.

In: a config, the fingerprints of frozen networks, counts. Out: a `Job`, which
says what each row depends on, and the state of its shards. A shard is whole
once `<shard>.json` says so; `manifest.json` lists all shards once all are
whole. Another config or another network than that of the cache is an error
that names both. Called by `precompute.py`, the source `cache`, `train/inputs`.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from scar_jax import paths
from scar_jax.config_values import read_section
from scar_jax.data.shards import Columns, checksum, read_dtype
from scar_jax.data.text import find_vocab

FORMAT = 1
MANIFEST = 'manifest.json'
FAILED = 'failed.jsonl'
# Fields of `data` that change no row. A mixture is made of caches, and no cache
# of several shapes.
_NO_CONTENT = (
  *('mixture', 'batch', 'workers', 'strict', 'max_bad_share', 'cache'),
  *('aspects', 'aspect_step'),
)
# Fields that training from the cache must have as its maker had them.
_CHECKED = (
  *('kind', 'control', 'split', 'image_size', 'fit', 'crop_ratio', 'flip'),
  'augment',
)
_TEXT = ('kind', 'length', 'pad', 'clean')


@dataclasses.dataclass(frozen=True)
class Job:
  """What is to be made; two processes with the same job make the same rows.

  Attributes:
    records: of the source.
    variants: rows of each record; the one numbered v is drawn as training
      without a cache draws the record in epoch v.
    shard_rows: rows of every shard but the last.
    columns: of a row.
    settings: `section.field` -> value, of all fields that a row depends on.
    made_with: name -> fingerprint, of the networks and vocabularies whose
      outputs are stored.
  """

  records: int
  variants: int
  shard_rows: int
  columns: Columns
  settings: Mapping[str, Any]
  made_with: Mapping[str, str]

  @property
  def rows(self) -> int:
    """Rows of all shards; row v * records + i is variant v of record i."""
    return self.records * self.variants

  @property
  def shards(self) -> int:
    return -(-self.rows // self.shard_rows)

  def rows_of(self, shard: int) -> range:
    """Numbers of the rows of a shard."""
    first = shard * self.shard_rows
    return range(first, min(first + self.shard_rows, self.rows))

  def name_of(self, shard: int) -> str:
    """File of a shard, in the folder of the cache."""
    return f'rows-{shard:05d}-of-{self.shards:05d}.array_record'

  def plain(self) -> dict[str, Any]:
    """Plain data for JSON."""
    return {
      'format': FORMAT,
      'records': self.records,
      'variants': self.variants,
      'shard_rows': self.shard_rows,
      'columns': {
        name: [dtype.name, list(shape)]
        for name, (dtype, shape) in self.columns.items()
      },
      'settings': json.loads(json.dumps(self.settings)),
      'made_with': dict(self.made_with),
    }

  @property
  def mark(self) -> str:
    """Twelve hex digits of a hash over all of it."""
    text = json.dumps(self.plain(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def settings_of(config: Any) -> dict[str, Any]:
  """Every field of a checked config that a row depends on."""
  found = {
    f'data.{name}': value
    for name, value in vars(config.data).items()
    if name not in _NO_CONTENT
  }
  return {'seed': config.seed, **found, **text_settings(config)}


def text_settings(config: Any) -> dict[str, Any]:
  """The fields outside of `data` that a row depends on."""
  text = config.text
  found = {f'text.{name}': getattr(text, name) for name in _TEXT}
  if text.kind == 'label':
    found['text.classes'] = text.classes
  return found | {
    'encoder.dtype': config.encoder.dtype,
    'text.dtype': text.dtype,
  }


def vocab_mark(config: Any) -> dict[str, str]:
  """'vocab' -> fingerprint of the file of a T5 vocabulary, if one is used."""
  if config.text.kind != 't5':
    return {}
  return {'vocab': checksum(find_vocab(config.text.vocab))[:12]}


def read_manifest(folder: str | pathlib.Path) -> tuple[Job, dict[str, Any]]:
  """The job of a cache and the whole manifest.

  Raises:
    ValueError: no cache there, or one of another version.
  """
  path = pathlib.Path(folder) / MANIFEST
  try:
    plain = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise ValueError(
      f'data.path={str(folder)!r} has no {MANIFEST}; accepted: a folder made '
      'by scar tokenize --config=C --out=DIR'
    ) from None
  except (OSError, ValueError) as error:
    raise ValueError(f'{path} cannot be read: {error}') from error
  if plain.get('format') != FORMAT:
    raise ValueError(
      f'{path} has format {plain.get("format")!r}, this version reads {FORMAT}'
    )
  columns = {
    name: (read_dtype(dtype), tuple(shape))
    for name, (dtype, shape) in plain['columns'].items()
  }
  names = ('records', 'variants', 'shard_rows', 'settings', 'made_with')
  job = Job(columns=columns, **{name: plain[name] for name in names})
  return job, plain


def job_of(data: Any) -> Job | None:
  """The job of the cache that a `data` section reads, of a mixture the first.

  None if it reads none.

  Raises:
    ValueError: see `read_manifest`.
  """
  first = data.mixture[0] if data.mixture else data
  if first.source != 'cache':
    return None
  folder = os.path.join(data.path, first.path) if data.mixture else data.path
  return read_manifest(folder)[0]


def made_from(data: Any) -> Any:
  """The `data` section that a cache was made from; any other as it is.

  A model is scored on pictures, also where it was trained without them.
  """
  job = job_of(data)
  if job is None or data.mixture:
    return data
  fields = {
    name.removeprefix('data.'): value
    for name, value in job.settings.items()
    if name.startswith('data.')
  }
  return read_section('data', type(data), fields)


def open_job(folder: pathlib.Path, job: Job) -> None:
  """Says in the folder what it holds, or refuses it for another job.

  Raises:
    ValueError: the folder holds rows of another job; names what differs.
  """
  path = folder / MANIFEST
  if path.exists():
    there, _ = read_manifest(folder)
    if there.mark != job.mark:
      listed = '; '.join(differences(_flat(there), _flat(job)))
      raise ValueError(
        f'{folder} holds rows of another job ({there.mark}, this one is '
        f'{job.mark}): {listed}. Accepted: the same, or another --out'
      )
    return
  folder.mkdir(parents=True, exist_ok=True)
  write_json(path, job.plain())


def _flat(job: Job) -> dict[str, Any]:
  plain = job.plain()
  settings, made_with = plain.pop('settings'), plain.pop('made_with')
  return plain | settings | {f'{k} made with': v for k, v in made_with.items()}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
  """`name: there -> here` for each value that differs."""
  absent = '(absent)'
  return [
    f'{name}: {there.get(name, absent)!r} -> {here.get(name, absent)!r}'
    for name in dict.fromkeys((*there, *here))
    if there.get(name, absent) != here.get(name, absent)
  ]


def check_data(folder: str, job: Job, data: Any, split: str) -> None:
  """Refuses a `data` section that says otherwise than that of the cache.

  Raises:
    ValueError: names each field, in the cache and here.
  """
  here = {f'data.{name}': getattr(data, name) for name in _CHECKED}
  here = json.loads(json.dumps(here | {'data.split': split}))
  there = {name: job.settings.get(name) for name in here}
  _refuse(folder, differences(there, here))


def check_networks(
  folder: str, job: Job, config: Any, marks: Mapping[str, str] | None = None
) -> None:
  """Refuses a text section or a network that the cache was not made with.

  Args:
    folder: of the cache, for messages.
    job: of the cache.
    config: checked, of the run.
    marks: name -> fingerprint of the networks of the run; None judges none.

  Raises:
    ValueError: names each field and fingerprint, in the cache and here.
  """
  here = json.loads(json.dumps(text_settings(config)))
  there = {name: job.settings.get(name) for name in here}
  found = differences(there, here)
  if marks is not None:
    known = {**marks, **vocab_mark(config)}
    used = {name: known.get(name, '(absent)') for name in job.made_with}
    found += [
      f'fingerprint of {line}' for line in differences(job.made_with, used)
    ]
  _refuse(folder, found)


def _refuse(folder: str, found: list[str]) -> None:
  if found:
    raise ValueError(
      f'the cache {folder} was made otherwise (there -> here): '
      f'{"; ".join(found)}. Accepted: the config and the networks it was made '
      'with, or a new scar tokenize --out'
    )


def shard_file(folder: pathlib.Path, job: Job, shard: int) -> pathlib.Path:
  """The file that says that a shard is whole."""
  return folder / f'{job.name_of(shard)}.json'


def whole_shard(
  folder: pathlib.Path, job: Job, shard: int, verify: bool = False
) -> dict[str, Any] | None:
  """What a whole shard says of itself; None if it is to be made (again).

  Args:
    folder: of the cache.
    job: its job.
    shard: number.
    verify: read all of it and compare its checksum; else only its size.
  """
  path = folder / job.name_of(shard)
  try:
    found = json.loads(shard_file(folder, job, shard).read_bytes())
    if found['mark'] != job.mark or path.stat().st_size != found['bytes']:
      return None
  except (OSError, ValueError, KeyError, TypeError):
    return None
  if verify and checksum(path) != found['sha256']:
    return None
  return found


def finish(folder: pathlib.Path, job: Job) -> dict[str, Any] | None:
  """Writes the whole manifest; None while shards are missing.

  Whoever makes the last shard does it, and the content is the same for all.
  """
  found = [whole_shard(folder, job, shard) for shard in range(job.shards)]
  shards = [shard for shard in found if shard is not None]
  if len(shards) < job.shards:
    return None
  failed = [line for shard in shards for line in shard['failed']]
  lines = ''.join(json.dumps(line) + '\n' for line in failed)
  paths.write_text(epath.Path(folder / FAILED), lines)
  manifest = {
    **job.plain(),
    'mark': job.mark,
    'rows': job.rows,
    'failed': len(failed),
    'bytes': sum(shard['bytes'] for shard in shards),
    'shards': [
      {
        'file': job.name_of(i),
        'rows': len(job.rows_of(i)),
        'failed': len(shard['failed']),
        'bytes': shard['bytes'],
        'sha256': shard['sha256'],
      }
      for i, shard in enumerate(shards)
    ],
  }
  write_json(folder / MANIFEST, manifest)
  return manifest


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON whole or not at all."""
  paths.write_text(epath.Path(path), json.dumps(value, indent=1) + '\n')
