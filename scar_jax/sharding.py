"""Mesh axes, the vocabulary of logical axes, and where arrays are placed.

Parameters and activations are annotated with logical axis names where they
are defined; one table maps those names to mesh axes. Flax does not object to
a misspelt logical name (the array is silently replicated), so names enter only
through `annotated` and `constrain`, which do. A dimension that its mesh axes do
not divide is replicated; `check_coverage` refuses large parameters left whole.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scar_jax.types import PyTree

MESH_AXES = ('replica', 'data', 'fsdp', 'tensor')
BATCH_AXES = MESH_AXES[:-1]  # that split a batch

# Logical axis -> mesh axes. Each name appears once: no rule can shadow another.
LOGICAL_RULES: tuple[tuple[str, Any], ...] = (
  ('batch', BATCH_AXES),
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  ('conv_out', ('fsdp', 'tensor')),
  ('table', ('fsdp', 'tensor')),
  ('layers', None),
  ('length', None),
  ('act_length', 'tensor'),
  ('head_dim', None),
  ('act_embed', None),
  ('act_heads', 'tensor'),
  ('act_mlp', 'tensor'),
  ('act_vocab', 'tensor'),
)
_VOCABULARY = frozenset(name for name, _ in LOGICAL_RULES)
# Sequences are rarely multiples of anything: the compiler pads these.
_UNEVEN = frozenset({'act_length'})


def _checked(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  unknown = [a for a in axes if a is not None and a not in _VOCABULARY]
  if unknown:
    raise ValueError(
      f'unknown logical axis {unknown} in {axes}; '
      f'accepted: {sorted(_VOCABULARY)} or None'
    )
  return axes


def annotated(
  init: Callable[..., Any], *axes: str | None
) -> Callable[..., Any]:
  """An initialiser whose parameter carries logical axis names.

  Args:
    init: any Flax initialiser.
    *axes: one logical name (or None) for each dimension of the parameter.

  Raises:
    ValueError: a name is not in the vocabulary.
  """
  return nn.with_logical_partitioning(init, _checked(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation to its logical sharding; a no-op off-mesh.

  The mesh is the one of the surrounding `jax.set_mesh`.
  """
  _checked(axes)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = logical_spec(axes, x.shape, dict(mesh.shape), _UNEVEN)
  return jax.lax.with_sharding_constraint(x, spec)


def mapped(
  local: Callable[..., jax.Array],
  args: Sequence[jax.Array],
  axes: Sequence[tuple[str | None, ...]],
) -> jax.Array:
  """`local(*args)` on each device's own part of the arguments.

  For kernels, which the compiler cannot split. `local` must treat what is
  split independently, and its result is placed as the first argument. Off-mesh
  it is just called.

  Args:
    local: a function of arrays.
    args: its arguments.
    axes: logical axes of each.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return local(*args)
  sizes = dict(mesh.shape)
  specs = tuple(
    logical_spec(_checked(names), x.shape, sizes)
    for names, x in zip(axes, args, strict=True)
  )
  # Kernels do not say how their results vary over the mesh: no check.
  return jax.shard_map(
    local, in_specs=specs, out_specs=specs[0], check_vma=False
  )(*args)


def platform() -> str:
  """'tpu', 'gpu' or 'cpu': that of the surrounding mesh, or jax's own.

  The mesh may be one of described devices, compiled for on another machine.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def axis_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
  """Sizes of all mesh axes, the one -1 filled in.

  Args:
    sizes: axis name -> size; absent axes are 1, at most one is -1.
    devices: how many devices the mesh spans.

  Raises:
    ValueError: the sizes cannot multiply to `devices`.
  """
  full = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
  text = ', '.join(f'mesh.{a}={n}' for a, n in full.items())
  where = '(set --config.mesh.data, fsdp, tensor)'
  if any(n == 0 or n < -1 for n in full.values()):
    raise ValueError(f'{text}: an axis is 1 or more, or -1 {where}')
  rest = [a for a, n in full.items() if n == -1]
  if len(rest) > 1:
    raise ValueError(f'{text}: only one axis may be -1 {where}')
  fixed = math.prod(n for n in full.values() if n != -1)
  if devices % fixed or (not rest and fixed != devices):
    raise ValueError(
      f'{text} multiply to {fixed}, but there are {devices} devices; '
      f'accepted: sizes whose product is {devices}, one may be -1 {where}'
    )
  if rest:
    full[rest[0]] = devices // fixed
  return full


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[Any] | None = None
) -> Mesh:
  """The mesh of axes `replica, data, fsdp, tensor`, in this order.

  Where the devices are several TPU slices, `replica` crosses the slices, whose
  network is the slow one, and all other axes stay inside of them.

  Args:
    sizes: see `axis_sizes`.
    devices: all devices of the job by default.

  Raises:
    ValueError: the sizes do not fit the devices, or the slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  full = axis_sizes(sizes, len(devices))
  types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if slices == 1:
    shape = tuple(full.values())
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
  if full['replica'] % slices:
    raise ValueError(
      f'mesh.replica={full["replica"]}, but the devices lie in {slices} slices '
      f'and no other axis may cross them; accepted: multiples of {slices} '
      '(set --config.mesh.replica)'
    )
  inner = (full['replica'] // slices, *list(full.values())[1:])
  grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices)
  return Mesh(grid, MESH_AXES, axis_types=types)


def batch_ways(mesh: Mesh) -> int:
  """Over how many devices the batch dimension is split."""
  return math.prod(mesh.shape[a] for a in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of every array of a batch: rows over all but `tensor`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def logical_spec(
  axes: Iterable[str | None],
  shape: Sequence[int],
  mesh: Mapping[str, int],
  uneven: Collection[str] = (),
) -> PartitionSpec:
  """Mesh axes of each dimension: by the rules, where sizes divide.

  A mesh axis serves one dimension only (the first that asks). A dimension that
  its axes do not divide is split over as many of them, from the first, as do.

  Args:
    axes: logical name (or None) of each dimension.
    shape: sizes; 0 is divided by all.
    mesh: sizes of the mesh axes.
    uneven: logical names that need not divide.
  """
  rules, used, spec = dict(LOGICAL_RULES), set(), []
  for name, size in zip(axes, shape, strict=True):
    wanted = rules.get(name) if name else None
    wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
    names = tuple(a for a in wanted if a not in used and mesh.get(a, 1) > 1)
    while name not in uneven and size % math.prod(mesh[a] for a in names):
      names = names[:-1]
    if names:
      used.update(names)
      spec.append(names[0] if len(names) == 1 else names)
    else:
      spec.append(None)
  return PartitionSpec(*spec)


def path_name(path: Sequence[Any]) -> str:
  """`a/b/c` of a jax key path."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', k))) for k in path)


def _is_box(leaf: Any) -> bool:
  return isinstance(leaf, nn.Partitioned)


def unbox(tree: PyTree) -> PyTree:
  """The tree without its logical-axis boxes."""
  return jax.tree.map(
    lambda x: x.value if _is_box(x) else x, tree, is_leaf=_is_box
  )


def logical_axes(tree: PyTree) -> PyTree:
  """Tuple of logical names (or None) of each leaf, as in a boxed tree."""
  return jax.tree.map(
    lambda x: tuple(x.names) if _is_box(x) else (None,) * x.ndim,
    tree,
    is_leaf=_is_box,
  )


def tree_shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
  """A NamedSharding for each leaf of a boxed abstract tree.

  Dimensions that stay whole although a rule asks for mesh axes are logged.
  """

  def place(path: Any, leaf: Any) -> NamedSharding:
    if not _is_box(leaf):
      return replicated(mesh)
    shape = leaf.value.shape
    spec = logical_spec(leaf.names, shape, mesh.shape)
    ideal = logical_spec(leaf.names, (0,) * len(shape), mesh.shape)
    if spec != ideal:
      logging.info(
        'sharding: %s %s asked for %s, its sizes allow %s',
        *(path_name(path), shape, ideal, spec),
      )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=_is_box)


def shardings_like(tree: PyTree, params: PyTree, shardings: PyTree) -> PyTree:
  """Shardings of a tree that holds copies of parameters (moments, EMA).

  A leaf whose path ends in a parameter's path, with its shape, is placed as
  that parameter; every other leaf is replicated.
  """
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  places = dict(
    zip(
      (path_name(path) for path, _ in flat),
      zip((x.shape for _, x in flat), jax.tree.leaves(shardings), strict=True),
      strict=True,
    )
  )
  whole = replicated(jax.tree.leaves(shardings)[0].mesh)

  def place(path: Any, leaf: Any) -> NamedSharding:
    for start in range(len(path)):
      shape, sharding = places.get(path_name(path[start:]), (None, None))
      if sharding is not None and shape == leaf.shape:
        return sharding
    return whole

  return jax.tree_util.tree_map_with_path(place, tree)


def frozen_shardings(
  tree: PyTree, mesh: Mesh, min_shard_bytes: int = 4 * 2**20
) -> PyTree:
  """Placement of networks that carry no logical axes.

  Large arrays are split over `fsdp` and `tensor` together, or the one of them
  that divides, on their largest dimension; small ones are copied. A frozen T5
  need not fit on one device: each layer is gathered when it is computed.
  """
  ways: list[tuple[str, ...]] = [('fsdp', 'tensor'), ('fsdp',), ('tensor',)]
  ways = [tuple(a for a in way if mesh.shape[a] > 1) for way in ways]

  def place(leaf: Any) -> NamedSharding:
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    for way in ways if size > min_shard_bytes else ():
      n = math.prod(mesh.shape[a] for a in way)
      dims = [d for d, length in enumerate(leaf.shape) if length % n == 0]
      if way and dims:
        best = max(dims, key=lambda d: leaf.shape[d])
        axes = way[0] if len(way) == 1 else way
        return NamedSharding(mesh, PartitionSpec(*[None] * best, axes))
    return replicated(mesh)

  return jax.tree.map(place, tree)


def check_coverage(
  params: PyTree,
  shardings: PyTree,
  mesh: Mesh,
  exempt: Sequence[str] = (),
  min_shard_bytes: int = 4 * 2**20,
) -> None:
  """Refuses large parameters that are whole on each device for no reason.

  Args:
    params: abstract parameters.
    shardings: their placement.
    mesh: the mesh.
    exempt: path prefixes that may stay replicated.
    min_shard_bytes: smaller parameters are not judged.

  Raises:
    ValueError: lists path, shape, spec and the mesh axes that would fit.
  """
  axes = {a: mesh.shape[a] for a in ('fsdp', 'tensor') if mesh.shape[a] > 1}
  bad = []
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  for (path, leaf), sharding in zip(
    flat, jax.tree.leaves(shardings), strict=True
  ):
    name = path_name(path)
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    split = any(axis for axis in sharding.spec)
    usable = [a for a, n in axes.items() if any(d % n == 0 for d in leaf.shape)]
    if size > min_shard_bytes and not split and usable:
      if name.startswith(tuple(exempt)):
        continue
      bad.append(f'{name} {leaf.shape} {sharding.spec} usable: {usable}')
  if bad:
    raise ValueError(
      f'{len(bad)} parameters above {min_shard_bytes} bytes are replicated '
      'although a mesh axis divides them (annotate their logical axes, or '
      'change --config.mesh): ' + '; '.join(bad)
    )
