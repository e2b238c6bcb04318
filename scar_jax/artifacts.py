"""Artifacts: frozen networks as directories, made once and read by other runs.

In: a kind, its config dataclass and parameters. Out: a directory with
`config.json` (kind, config, fingerprint, notes) and `params` (orbax). It is
written beside its place and renamed, or in a bucket gets its `config.json`
last, so a half-written one is never found. Of parameters that are spread over
several processes each writes its part. A work directory may be named in place
of the artifact that it holds.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from scar_jax import distributed, paths
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
  return _digest(config, _by_name(params))


def _by_name(params: PyTree) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  named = [(path_name(path), leaf) for path, leaf in leaves]
  return sorted(named, key=lambda item: item[0])


def _digest(config: Any, named: Iterable[tuple[str, Any]]) -> str:
  """Hash over config and arrays, which come in the order of their names."""
  digest = hashlib.sha256()
  plain = dataclasses.asdict(config)
  digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
  for name, leaf in named:
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

  Where parameters are spread over processes, all of them call this together
  and no host holds more than its share and one whole array.

  Args:
    directory: where it goes.
    kind: a short noun.
    config: dataclass of the model; its class is found again by import path.
    params: float arrays, or `Lazy` ones, which are made one at a time.
    meta: JSON-able notes.

  Returns:
    Its fingerprint; '' on processes other than the first.

  Raises:
    ValueError: a parameter is not finite.
  """
  target = paths.folder(directory)
  spread = any(
    isinstance(x, jax.Array) and not x.is_fully_addressable
    for x in jax.tree.leaves(params)
  )
  if not spread:
    params = jax.tree.map(
      lambda x: x if isinstance(x, Lazy) else np.asarray(jax.device_get(x)),
      params,
    )
  _check_finite(kind, params, spread)
  remote = paths.is_remote(target)
  part = target if remote else target.with_name(f'{target.name}.part')
  first = not spread or jax.process_index() == 0
  if first:
    # Without its description a directory in a bucket is not found.
    (part / 'config.json').unlink(missing_ok=True)
    part.rmtree(missing_ok=True)
    part.mkdir(parents=True)
  if spread:
    distributed.wait_for_all('artifact: directory')
  write_params(part / 'params', params)
  mark = ''
  if first:
    mark = (
      _digest(config, _stored(part / 'params', params))
      if spread
      else fingerprint(config, params)
    )
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
    paths.write_text(part / 'config.json', text + '\n')
    if not remote:
      paths.swap_in(part, target)
  if spread:
    distributed.wait_for_all('artifact: in its place')
  return mark


def _check_finite(kind: str, params: PyTree, spread: bool) -> None:
  """Names the first parameter that is not finite, on every process."""

  def finite(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)

  # bfloat16 is not a numpy floating type: widen before the test.
  good = (
    jax.device_get(jax.jit(finite)(params))
    if spread
    else jax.tree.map(
      lambda x: np.isfinite(np.asarray(x).astype(np.float32, copy=False)).all(),
      params,
    )
  )
  for path, fine in jax.tree_util.tree_leaves_with_path(good):
    if not fine:
      raise ValueError(
        f'{kind}: parameter {path_name(path)} is not finite; not exported'
      )


def _stored(
  folder: epath.Path, params: PyTree
) -> Iterable[tuple[str, np.ndarray]]:
  """Path and value of each parameter on disk, read whole, one at a time.

  The first process alone reads: the fingerprint of an artifact must not depend
  on how many processes wrote it.
  """
  alone = ocp.options.MultiprocessingOptions(
    active_processes={jax.process_index()},
    primary_host=jax.process_index(),
    barrier_sync_key_prefix='fingerprint',
  )
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
  with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
    for name, leaf in _by_name(params):
      tree: Any = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      restore: Any = ocp.RestoreArgs(restore_type=np.ndarray)
      for key in reversed(name.split('/')):
        tree, restore = {key: tree}, {key: restore}
      found = reader.restore(
        folder,
        args=ocp.args.PyTreeRestore(
          tree, restore_args=restore, partial_restore=True
        ),
      )
      yield name, jax.tree.leaves(found)[0]


def find_artifact(path: str | os.PathLike[str]) -> epath.Path:
  """The artifact directory that a path names, a work directory's included.

  Raises:
    ValueError: there is none; lists what lies there.
  """
  given = paths.folder(path)
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


def find_part(given: str, home: str | os.PathLike[str]) -> str:
  """The directory of a frozen network that a run has used.

  A moved run is still found: the path is tried as it was given, then inside
  and beside the model's own work directory.

  Args:
    given: path recorded in training, relative or absolute.
    home: directory of the model's artifact.

  Raises:
    ValueError: it is in none of these places.
  """
  home, wanted = pathlib.Path(home).absolute(), pathlib.Path(given)
  work = home.parent if home.name == 'artifact' else home
  places = [wanted, home / wanted, work / wanted, work.parent / wanted]
  # runs/q/tokenizer/artifact, asked for from a copy of runs/q/scar.
  for tail in (wanted.name, os.path.join(*wanted.parts[-2:])):
    places += [work / tail, work.parent / tail]
  for place in places:
    if place.is_dir():
      return str(place)
  raise ValueError(
    f'frozen network {given!r} not found; tried '
    f'{", ".join(dict.fromkeys(map(str, places)))}; accepted: its artifact '
    'directory (pass it to Editor.load as tokenizer=, encoder= or text=)'
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
    stored = reader.metadata(place / 'params').item_metadata.tree
    shapes = jax.tree.map(
      lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), stored
    )
    target = jax.tree.map(
      lambda s, place: s.update(sharding=place),
      shapes,
      _placement(shapes, mesh),
    )
    params = reader.restore(place / 'params', target)
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
