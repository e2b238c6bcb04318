"""The compiled programs of an `Editor`, and the folder they are kept in.

In: the frozen networks around a model, and arrays of one batch. Out: uint8
pictures. A program is traced once for each setting and shape. With a folder it
is exported there (`jax.export`) and compiled programs lie beside it, so that
the next process neither traces nor compiles. Called by `editor.py`,
`plan/compile.py`.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax import export
from jaxtyping import Array, Bool, Float, Int, UInt8

from scar_jax.eval.report import write_atomic
from scar_jax.filters import SamplerConfig
from scar_jax.models.scar import Scar
from scar_jax.orders.random import Known
from scar_jax.parts import Parts, to_uint8
from scar_jax.sampling import generate
from scar_jax.types import Batch, PyTree


def make_pictures(
  parts: Parts,
  params: PyTree,
  frozen: Mapping[str, PyTree],
  batch: Batch,
  seeds: Int[Array, ' B'],
  scales: Float[Array, ' 3'],
  cfg: SamplerConfig,
  copies: int = 1,
  given: int = 0,
) -> tuple[UInt8[Array, 'B H W 3'], Bool[Array, ' B']]:
  """From condition pictures and text to pictures; pure and traceable.

  Args:
    parts: the networks.
    params: of the model.
    frozen: of the other networks.
    batch: fields of B / copies requests; with `keep` [B / copies, N] the
      tokens of the condition that stay.
    seeds: of each picture.
    scales: see `sampling.generate`.
    cfg: of the sampler, static.
    copies: pictures in a row that share a request.
    given: see `Known`.

  Returns:
    Pictures, and which of them come from numbers that are not finite.
  """
  known = None
  if 'keep' in batch:
    keep = jnp.asarray(batch['keep'])
    tokens = parts.tokens(frozen, jnp.asarray(batch['condition']))
    known = Known(
      jnp.repeat(tokens.reshape(keep.shape), copies, axis=0),
      jnp.repeat(keep, copies, axis=0),
      given,
    )
  made = generate(
    Scar(parts.cfg.model),
    {'params': params},
    parts.conditions(frozen, batch)[0],
    seeds,
    scales,
    cfg,
    accumulate=parts.accumulate(frozen),
    known=known,
    copies=copies,
  )
  images = parts.images(frozen, made.tokens, made.latent)
  bad = made.bad | ~jnp.isfinite(images).all(axis=(1, 2, 3))
  return to_uint8(images), bad


class Programs:
  """`make_pictures` of one editor, compiled.

  Attributes:
    traced: how many programs were traced in this process.
    read: how many came from the folder.
  """

  def __init__(
    self, parts: Parts, folder: str | os.PathLike[str] | None = None
  ):
    """No program yet.

    Args:
      parts: the networks.
      folder: where programs are kept; None keeps none.
    """
    self._parts, self.traced, self.read = parts, 0, 0
    self._folder = None if folder is None else pathlib.Path(folder)
    self._ready: dict[Any, Callable[..., Any]] = {}

  def __call__(
    self, cfg: SamplerConfig, copies: int, given: int, *args: Any
  ) -> tuple[UInt8[Array, 'B H W 3'], Bool[Array, ' B']]:
    """Runs `make_pictures(*args)`; see there for the order of `args`."""
    static, batch = (cfg, copies, given), args[2]
    shapes = tuple((k, v.shape, str(v.dtype)) for k, v in sorted(batch.items()))
    key = (*static, shapes)
    if key not in self._ready:
      self._ready[key] = self._make(static, args)
    return self._ready[key](*args)

  def _make(self, static: tuple[Any, ...], args: Any) -> Callable[..., Any]:
    path = None
    if self._folder is not None:
      path = self._folder / f'{self._name(static, args)}.jax'
    if path is not None and path.exists():
      try:
        kept = export.deserialize(bytearray(path.read_bytes()))
        self.read += 1
        return jax.jit(kept.call)
      except Exception as error:  # of many kinds, by version of JAX
        logging.warning('%s cannot be used, tracing again: %s', path, error)
    cfg, copies, given = static
    program: Any = functools.partial(make_pictures, self._parts)
    jitted = jax.jit(
      lambda *args: program(*args, cfg, copies=copies, given=given)
    )
    self.traced += 1
    if path is None:
      return jitted
    exported = export.export(jitted)(*args)
    write_atomic(path, lambda file: file.write(exported.serialize()))
    # The exported one, so that its compiled form serves the next process too.
    return jax.jit(exported.call)

  def _name(self, static: tuple[Any, ...], args: Any) -> str:
    """All that shapes the program, as twenty hex digits."""
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), args)
    own = self._parts.cfg, self._parts.configs
    told = (static, shapes, jax.tree.structure(args), own, _here())
    return hashlib.sha256(repr(told).encode()).hexdigest()[:20]


@functools.cache
def _here() -> tuple[str, ...]:
  """Versions of JAX and of this code, and the kind of device."""
  digest = hashlib.sha256()
  for path in sorted(pathlib.Path(__file__).parent.rglob('*.py')):
    digest.update(path.read_bytes())
  device = jax.devices()[0]
  return (
    jax.__version__,
    device.platform,
    device.device_kind,
    digest.hexdigest(),
  )


def use_compilation_cache(folder: pathlib.Path) -> None:
  """Keeps what XLA compiles in `folder`, unless JAX was told of another."""
  if jax.config.jax_compilation_cache_dir:
    return
  (folder / 'xla').mkdir(parents=True, exist_ok=True, mode=0o700)
  jax.config.update('jax_compilation_cache_dir', str(folder / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
