"""Artifacts: frozen networks as directories, made once and read by other runs.

In: a kind, its config dataclass and parameters. Out: a directory with
`config.json` (kind, config, fingerprint, notes) and `params` (orbax). It is
written beside its place and renamed, so a half-written one is never found. A
work directory may be named in place of the artifact that it holds.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from scar_jax.config_values import nearest, read_section
from scar_jax.sharding import frozen_shardings, path_name
from scar_jax.streaming import Lazy, write_params
from scar_jax.types import PyTree

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A loaded artifact.

  Attributes:
    kind: what it is: 'tokenizer', 'encoder', 'text', 'scar', ...
    config: the dataclass that its model takes.
    params: its parameters, on the mesh if one was given.
    fingerprint: hash of config and parameters.
    meta: what its maker noted (step, sources, versions).
    path: where it was read.
  """

  kind: str
  config: Any
  params: PyTree
  fingerprint: str
  meta: Mapping[str, Any]
  path: str


def fingerprint(config: Any, params: PyTree) -> str:
  """Twelve hex digits of a hash over config, paths, shapes and values."""
  digest = hashlib.sha256()
  plain = dataclasses.asdict(config)
  digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for name, leaf in sorted((path_name(p), x) for p, x in leaves):
    array = np.asarray(jax.device_get(leaf))
    digest.update(f'{name}{array.shape}{array.dtype}'.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()[:12]


def save_artifact(
  directory: str | os.PathLike[str],
  kind: str,
  config: Any,
  params: PyTree,
  meta: Mapping[str, Any] | None = None,
) -> str:
  """Writes an artifact, in place of an older one at the same path.

  Args:
    directory: where it goes.
    kind: a short noun.
    config: dataclass of the model; its class is found again by import path.
    params: float arrays, or `Lazy` ones, which are made one at a time.
    meta: JSON-able notes.

  Returns:
    Its fingerprint.

  Raises:
    ValueError: a parameter is not finite.
  """
  target = pathlib.Path(directory).absolute()
  params = jax.tree.map(
    lambda x: x if isinstance(x, Lazy) else np.asarray(jax.device_get(x)),
    params,
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    # bfloat16 is not a numpy floating type: widen before the test.
    wide = np.asarray(leaf).astype(np.float32, copy=False)
    if not np.isfinite(wide).all():
      raise ValueError(
        f'{kind}: parameter {path_name(path)} is not finite; not exported'
      )
  mark = fingerprint(config, params)
  part = target.with_name(f'{target.name}.part')
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir(parents=True)
  write_params(part / 'params', params)
  cls = type(config)
  description = {
    'format': FORMAT,
    'kind': kind,
    'class': f'{cls.__module__}:{cls.__qualname__}',
    'config': dataclasses.asdict(config),
    'fingerprint': mark,
    'meta': dict(meta or {}),
  }
  text = json.dumps(description, indent=1, sort_keys=True)
  (part / 'config.json').write_text(text + '\n')
  if target.exists():
    old = target.with_name(f'{target.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    part.rename(target)
    shutil.rmtree(old)
  else:
    part.rename(target)
  return mark


def find_artifact(path: str | os.PathLike[str]) -> pathlib.Path:
  """The artifact directory that a path names, a work directory's included.

  Raises:
    ValueError: there is none; lists what lies there.
  """
  given = pathlib.Path(path)
  for place in (given, given / 'artifact'):
    if (place / 'config.json').is_file() and (place / 'params').is_dir():
      return place
  if not given.is_dir():
    parent = given.parent
    known = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
    raise ValueError(
      f'no artifact at {given}: no such directory.{nearest(given.name, known)}'
    )
  raise ValueError(
    f'no artifact at {given}: wanted config.json and params there or in '
    f'artifact/; found {sorted(p.name for p in given.iterdir())[:10]}. '
    'A run writes its artifact when it ends'
  )


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
  """What `config.json` of an artifact says, without its parameters."""
  place = find_artifact(path)
  try:
    return json.loads((place / 'config.json').read_text())
  except ValueError as error:
    raise ValueError(f'{place}/config.json is not JSON: {error}') from error


def load_artifact(
  path: str | os.PathLike[str],
  kind: str | Sequence[str] | None = None,
  mesh: Mesh | None = None,
) -> Artifact:
  """Reads an artifact.

  Args:
    path: its directory, or the work directory of the run that made it.
    kind: what is accepted; anything by default.
    mesh: where to place it, large arrays split; else the first device.

  Raises:
    ValueError: nothing there, another kind, a format of another version, a
      config that its class does not take.
  """
  place = find_artifact(path)
  description = read_description(place)
  if description.get('format') != FORMAT:
    raise ValueError(
      f'{place} has artifact format {description.get("format")}, this version '
      f'reads {FORMAT}'
    )
  kinds = (kind,) if isinstance(kind, str) else kind
  if kinds and description['kind'] not in kinds:
    raise ValueError(
      f'{place} holds a {description["kind"]!r} artifact; '
      f'wanted: {", ".join(kinds)}'
    )
  module, name = description['class'].split(':')
  cls = getattr(importlib.import_module(module), name)
  config = read_section(description['kind'], cls, description['config'])
  with ocp.StandardCheckpointer() as reader:
    stored = reader.metadata(place.absolute() / 'params').item_metadata.tree
    shapes = jax.tree.map(
      lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), stored
    )
    target = jax.tree.map(
      lambda s, place: s.update(sharding=place),
      shapes,
      _placement(shapes, mesh),
    )
    params = reader.restore(place.absolute() / 'params', target)
  return Artifact(
    kind=description['kind'],
    config=config,
    params=params,
    fingerprint=description['fingerprint'],
    meta=description['meta'],
    path=str(place),
  )


def _placement(shapes: PyTree, mesh: Mesh | None) -> PyTree:
  if mesh is not None:
    return frozen_shardings(shapes, mesh)
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda _: one, shapes)


def check_same_tree(name: str, want: PyTree, got: PyTree) -> None:
  """Compares two parameter trees by path and shape.

  Raises:
    ValueError: lists what is missing, unexpected or of another shape.
  """

  def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    flat: Sequence[Any] = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(p): tuple(x.shape) for p, x in flat}

  wanted, found = shapes(want), shapes(got)
  lines = [f'missing {k} {s}' for k, s in wanted.items() if k not in found]
  lines += [f'unexpected {k} {s}' for k, s in found.items() if k not in wanted]
  lines += [
    f'{k}: expected {s}, got {found[k]}'
    for k, s in wanted.items()
    if k in found and found[k] != s
  ]
  if lines:
    raise ValueError(f'{name} does not fit the model: ' + '; '.join(lines))
