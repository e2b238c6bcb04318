"""Parameters of a run that starts from another model.

In: fresh parameters, those of an artifact, and which parts the artifact may
lack, such as the prefix of a model that had none. Out: the artifact's where it
has them, else the fresh ones; anything else that differs is an error. Called by
`train/loop.py` for `init_from`.
"""

from collections.abc import Sequence

import jax
from absl import logging

from scar_jax.artifacts import check_same_tree
from scar_jax.sharding import path_name
from scar_jax.types import PyTree


def start_from(
  name: str, fresh: PyTree, given: PyTree, new: Sequence[str] = ()
) -> PyTree:
  """The parameters that training starts with, placed like the fresh ones.

  Args:
    name: of what is started from, for messages.
    fresh: parameters as `init` makes them.
    given: parameters of the other model.
    new: beginnings of the paths of parameters that it may lack.

  Raises:
    ValueError: lists what is missing, unexpected or of another shape.
  """
  leaves, tree = jax.tree_util.tree_flatten_with_path(fresh)
  paths = [path_name(path) for path, _ in leaves]
  flat = jax.tree_util.tree_leaves_with_path(given)
  known = {path_name(path): leaf for path, leaf in flat}
  kept = [p for p in paths if p not in known and p.startswith(tuple(new))]
  wanted = {
    path: leaf
    for path, (_, leaf) in zip(paths, leaves, strict=True)
    if path not in kept
  }
  check_same_tree(name, wanted, known)
  if kept:
    logging.info('%s lacks these, which start afresh: %s', name, kept)
  made = [
    leaf if path in kept else jax.device_put(known[path], leaf.sharding)
    for path, (_, leaf) in zip(paths, leaves, strict=True)
  ]
  return jax.tree_util.tree_unflatten(tree, made)
