"""Parameters that are made while they are written, one array at a time.

In: a tree whose leaves may be `Lazy`. Out: the same files as orbax makes of
arrays. A conversion needs memory for its largest parameter, not for all. Used
by `artifacts.py` and `convert/common.py`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from scar_jax.types import PyTree

_CHUNK = 64 * 2**20  # bytes that are compressed as one


class Lazy:
  """A float32 array that is made at every access and not kept."""

  dtype = np.dtype(np.float32)

  def __init__(self, shape: tuple[int, ...], make: Callable[[], np.ndarray]):
    self.shape, self._make = shape, make

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of entries."""
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    """Bytes once it is made."""
    return self.size * self.dtype.itemsize

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    return self._make().astype(dtype or self.dtype, copy=False)


class _OneByOne(ocp.type_handlers.NumpyHandler):
  """Writes each array before the next is made."""

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)

  async def serialize(
    self,
    values: Sequence[Any],
    infos: Sequence[Any],
    args: Sequence[Any] | None = None,
  ) -> Sequence[Any]:
    args = args or [ocp.SaveArgs()] * len(values)
    for value, info, arg in zip(values, infos, args, strict=True):
      for done in await super().serialize([np.asarray(value)], [info], [arg]):
        done.result()
    return []


def write_params(path: str | os.PathLike[str], params: PyTree) -> None:
  """Writes a tree of host arrays or `Lazy` leaves as orbax parameters."""
  leaves = jax.tree.leaves(params)
  if not any(isinstance(leaf, Lazy) for leaf in leaves):
    with ocp.StandardCheckpointer() as writer:
      writer.save(path, params)
    return
  registry = ocp.type_handlers.create_type_handler_registry(
    (Lazy, _OneByOne()),
    (np.ndarray, _OneByOne()),
    (jax.Array, ocp.type_handlers.ArrayHandler()),
  )
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  save_args = jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), params
  )
  with ocp.Checkpointer(handler) as writer:
    writer.save(path, args=ocp.args.PyTreeSave(params, save_args=save_args))
