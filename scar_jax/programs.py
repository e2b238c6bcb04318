"""The compiled programs of an `Editor`, and the folder they are kept in.

In: the frozen networks around a model, and arrays of one batch. Out: uint8
pictures. A program is traced once for each setting and shape. With a folder it
is exported there (`jax.export`) and compiled programs lie beside it, so that
the next process neither traces nor compiles. Called by `editor.py`.
"""

import dataclasses
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

from scar_jax import compiler
from scar_jax.eval.report import write_atomic
from scar_jax.filters import SamplerConfig
from scar_jax.models.conditions import Conditions
from scar_jax.models.scar import Scar
from scar_jax.orders.random import Known
from scar_jax.parts import Parts, to_uint8
from scar_jax.sampling import generate
from scar_jax.types import Batch, PyTree


class Programs:
  """From condition pictures and text to pictures, in three compiled steps.

  Conditions, tokens, pictures: a new setting of the sampler is a new program of
  the second step alone.

  Attributes:
    traced: how many programs were traced in this process.
    read: how many came from the folder.
  """

  def __init__(self, folder: str | os.PathLike[str] | None = None):
    """No program yet.

    Args:
      folder: where programs are kept; None keeps none.
    """
    self.traced = self.read = 0
    self._folder = None if folder is None else pathlib.Path(folder)
    self._ready: dict[Any, Callable[..., Any]] = {}

  def __call__(
    self,
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
    """Makes the pictures of one padded batch.

    Args:
      parts: the networks, for pictures of this shape.
      params: of the model.
      frozen: of the other networks.
      batch: fields of B / copies requests; with `keep` [B / copies, N] the
        tokens of the condition that stay.
      seeds: of each picture.
      scales: see `sampling.generate`.
      cfg: of the sampler, as `split_scales` leaves it.
      copies: pictures in a row that share a request.
      given: see `Known`.

    Returns:
      Pictures, and which of them come from numbers that are not finite.
    """
    run = functools.partial(self._run, parts)
    fields = run('conditions', (), (frozen,), (batch,))
    static = (cfg, copies, given)
    made = run('sample', static, (params, frozen), (fields, seeds, scales))
    bad = made.pop('bad')
    images, broken = run('decode', (), (frozen,), (made,))
    return images, bad | broken

  def _conditions(
    self, parts: Parts, frozen: Any, batch: Batch
  ) -> dict[str, Array]:
    """What the sampler needs of a batch, without what is absent."""
    cond = parts.conditions(frozen, batch)[0]
    fields = {f.name: getattr(cond, f.name) for f in dataclasses.fields(cond)}
    fields = {name: x for name, x in fields.items() if x is not None}
    if 'keep' in batch:
      tokens = parts.tokens(frozen, jnp.asarray(batch['condition']))
      fields['keep'] = jnp.asarray(batch['keep'])
      fields['known'] = tokens.reshape(fields['keep'].shape)
    return fields

  def _sample(
    self,
    parts: Parts,
    cfg: SamplerConfig,
    copies: int,
    given: int,
    params: PyTree,
    frozen: Any,
    fields: dict[str, Array],
    seeds: Array,
    scales: Array,
  ) -> dict[str, Array]:
    """Tokens, the scale order's latent, and which samples are undrawable."""
    known, fields = None, dict(fields)
    if 'keep' in fields:
      tokens, keep = (
        jnp.repeat(fields.pop(name), copies, axis=0)
        for name in ('known', 'keep')
      )
      known = Known(tokens, keep, given)
    made = generate(
      Scar(parts.cfg.model),
      {'params': params},
      Conditions(**fields),
      seeds,
      scales,
      cfg,
      accumulate=parts.accumulate(frozen),
      known=known,
      copies=copies,
    )
    latent = {} if made.latent is None else {'latent': made.latent}
    return {'tokens': made.tokens, 'bad': made.bad, **latent}

  def _decode(
    self, parts: Parts, frozen: Any, made: dict[str, Array]
  ) -> tuple[Array, Array]:
    images = parts.images(frozen, made['tokens'], made.get('latent'))
    return to_uint8(images), ~jnp.isfinite(images).all(axis=(1, 2, 3))

  def _run(
    self,
    parts: Parts,
    step: str,
    static: tuple[Any, ...],
    networks: tuple[PyTree, ...],
    arrays: tuple[Any, ...],
  ) -> Any:
    # The shapes of the networks never change.
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), arrays)
    key = (parts, step, static, repr(shapes))
    if key not in self._ready:
      self._ready[key] = self._make(parts, step, static, (*networks, *arrays))
    return self._ready[key](*networks, *arrays)

  def _make(
    self, parts: Parts, step: str, static: tuple[Any, ...], args: Any
  ) -> Callable[..., Any]:
    path = None
    if self._folder is not None:
      path = self._folder / f'{step}-{_name(parts, static, args)}.jax'
    if path is not None and path.exists():
      try:
        kept = export.deserialize(bytearray(path.read_bytes()))
        self.read += 1
        return jax.jit(kept.call, compiler_options=compiler.options())
      except Exception as error:  # of many kinds, by version of JAX
        logging.warning('%s cannot be used, tracing again: %s', path, error)
    jitted = jax.jit(
      functools.partial(getattr(self, f'_{step}'), parts, *static),
      compiler_options=compiler.options(),
    )
    self.traced += 1
    if path is None:
      return jitted
    exported = export.export(jitted)(*args)
    write_atomic(path, lambda file: file.write(exported.serialize()))
    # The exported one, so that its compiled form serves the next process too.
    return jax.jit(exported.call, compiler_options=compiler.options())


def _name(parts: Parts, static: tuple[Any, ...], args: Any) -> str:
  """All that shapes a program, as twenty hex digits."""
  shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), args)
  own = parts.cfg, parts.configs
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
