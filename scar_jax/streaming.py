"""Parameters that are made while they are written, a few at a time.

In: a tree whose leaves may be `Lazy`. Out: the same files as orbax makes of
arrays. A conversion needs memory for its largest parameter or 64 MiB, not for
all. Used by `artifacts.py` and `convert/common.py`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from scar_jax.types import PyTree

_CHUNK = 64 * 2**20  # bytes that are compressed, or made, as one


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


def _parts(values: Sequence[Any]) -> Iterator[slice]:
  """Runs of values of up to a chunk together, or of one that is larger."""
  start, held = 0, 0
  for i, value in enumerate(values):
    if held and held + value.nbytes > _CHUNK:
      yield slice(start, i)
      start, held = i, 0
    held += value.nbytes
  if start < len(values):
    yield slice(start, len(values))


class _InParts(ocp.type_handlers.NumpyHandler):
  """Writes some arrays before the next are made.

  One by one they would take far longer: each part is committed to disk.
  """

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)

  async def serialize(
    self,
    values: Sequence[Any],
    infos: Sequence[Any],
    args: Sequence[Any] | None = None,
  ) -> Sequence[Any]:
    args = args or [ocp.SaveArgs()] * len(values)
    for part in _parts(values):
      made = [np.asarray(value) for value in values[part]]
      for done in await super().serialize(made, infos[part], args[part]):
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
    (Lazy, _InParts()),
    (np.ndarray, _InParts()),
    (jax.Array, ocp.type_handlers.ArrayHandler()),
  )
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  save_args = jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), params
  )
  with ocp.Checkpointer(handler) as writer:
    writer.save(path, args=ocp.args.PyTreeSave(params, save_args=save_args))
