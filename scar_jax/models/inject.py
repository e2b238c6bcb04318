"""The condition injected while decoding: two baselines without a prefix.

In: embeddings of the condition's features `[B, P, D]` and which target each
position predicts. Out: an `Injection`, called at the input of three of the
decoder's blocks. Called by `models/scar.py`; the part that no position changes,
`memory`, is computed once for each image and lies in the cache. Source:
hustvl/ControlAR (arXiv 2410.02705) for the fusion and the depths; the cross-
attention is that of an encoder-decoder transformer at the same depths.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from scar_jax.models import layers as nl
from scar_jax.models.attention import attend
from scar_jax.models.dense import Dense, Init
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.resize import resize
from scar_jax.orders.layout import Inputs, laid_over
from scar_jax.sharding import annotated, constrain


def depths(layers: int) -> tuple[int, ...]:
  """Blocks that read the condition: those at 0, 1/3 and 2/3 of the depth."""
  return tuple(sorted({i * layers // 3 for i in range(3)}))


def read_by(
  order: Any, set0_len: int, some: slice, inputs: Inputs | None = None
) -> Int[Array, '*B M']:
  """Which target each position predicts, -1 for none.

  Args:
    order: of the target.
    set0_len: positions of set 0; the last may predict the first target.
    some: of these positions.
    inputs: of the target, behind them.
  """
  read: Any = np.full(set0_len, -1, np.int32)
  if order.from_prefix:
    read[-1] = 0
  read = read[some]
  if inputs is None:
    return read
  target = order.predicted(inputs)
  read = jnp.broadcast_to(read, (*target.shape[:-1], len(read)))
  return jnp.concatenate([read, target], axis=-1)


@struct.dataclass
class Injection:
  """What the blocks read, of the positions at hand; n blocks do.

  Attributes:
    depths: their numbers.
  """

  depths: tuple[int, ...] = struct.field(pytree_node=False)

  def __call__(
    self, x: Float[Array, 'B L D'], layer: Int[Array, ''], rope: Any
  ) -> Float[Array, 'B L D']:
    """The input of block `layer`; that of other blocks stays as it is."""
    here = jnp.asarray(self.depths) == layer
    return jax.lax.cond(
      jnp.any(here),
      lambda x: x + self.branch(x, jnp.argmax(here), rope).astype(x.dtype),
      lambda x: x,
      x,
    )

  def branch(self, x: Array, slot: Array, rope: Any) -> Array:
    """What is added to the residual stream, at `depths[slot]`."""
    raise NotImplementedError


@struct.dataclass
class Fusion(Injection):
  """The feature at the place of the token that a position predicts.

  Attributes:
    added: [B, n, L, D], zero where a position predicts nothing.
  """

  added: Float[Array, 'B n L D']

  def branch(self, x: Array, slot: Array, rope: Any) -> Array:
    """[B, L, D]."""
    return self.added[:, slot]


@struct.dataclass
class Cross(Injection):
  """Attention of every position to all features.

  Queries are rotated by their place and keys by theirs, on one grid: the
  features may know nothing of where they lie. The norm has no weight, which
  would only repeat the query's projection.

  Attributes:
    k: [B, n, P, H, K], rotated.
    v: [B, n, P, H, K].
    q: kernels [n, D, H, K].
    out: kernels [n, H, K, D].
    eps: of the norm.
  """

  k: Float[Array, 'B n P H K']
  v: Float[Array, 'B n P H K']
  q: Float[Array, 'n D H K']
  out: Float[Array, 'n H K D']
  eps: float = struct.field(pytree_node=False)

  def branch(self, x: Array, slot: Array, rope: Any) -> Array:
    """[B, L, D]."""
    k, v = self.k[:, slot], self.v[:, slot]
    normed = nl.layer_norm(x, self.eps).astype(k.dtype)
    q = jnp.einsum('bld,dhk->blhk', normed, self.q[slot].astype(k.dtype))
    if rope is not None:
      q = nl.rotate(q, *rope)
    q = constrain(q, 'batch', 'length', 'act_heads', 'head_dim')
    seen = attend(q, k, v, jnp.ones((1, 1, k.shape[1]), bool))
    return jnp.einsum('blhk,hkd->bld', seen, self.out[slot].astype(k.dtype))


class _Kernels(nn.Module):
  """Kernels of one linear map for each depth, used inside of the blocks."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Init

  @nn.compact
  def __call__(self) -> Float[Array, 'n ...']:
    init = annotated(self.init, 'layers', *self.axes)
    return self.param('kernel', init, self.shape)


class Injector(nn.Module):
  """Parameters of the injection, the depths along their first axis.

  They lie outside of the stacked blocks, most of which have none, and start
  from noise as the blocks' own do and as ControlAR's: there is no state of the
  decoder, trained or not, in which it would make do without its condition.

  Attributes:
    cfg: of the decoder.
    prefix: of the features; `inject` says which baseline.
    order: of the target.
  """

  cfg: Any
  prefix: PrefixConfig
  order: Any

  def setup(self):
    cfg = self.cfg
    init = nn.initializers.normal(cfg.init_std)
    self.depths = depths(cfg.layers)
    count = len(self.depths)

    def stacked(module: Any) -> Any:
      return nn.vmap(
        module,
        in_axes=None,
        out_axes=1,
        axis_size=count,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )

    D, heads = cfg.width, (cfg.heads, cfg.head_dim)
    if self.prefix.inject == 'fusion':
      self.mlp = stacked(nl.GeluMLP)(
        D, D, use_bias=False, kernel_init=init, dtype=cfg.dtype, name='mlp'
      )
      return
    names = ('heads', 'head_dim')
    self.kv = stacked(Dense)(
      (2, *heads),
      ('embed', None, *names),
      kernel_init=init,
      dtype=cfg.dtype,
      name='kv',
    )
    self.q = _Kernels((count, D, *heads), ('embed', *names), init, name='q')
    self.out = _Kernels((count, *heads, D), (*names, 'embed'), init, name='out')

  def __call__(self, x: Float[Array, 'B P D']) -> Any:
    """`memory`: what the injection needs of an image, batch first."""
    if self.prefix.inject == 'fusion':
      return self.mlp(self._of_targets(x))
    kv = self.kv(x)
    k, v = kv[..., 0, :, :], kv[..., 1, :, :]
    if self.order.name != 'scale':  # which has its places in `x`
      cells = laid_over(self.prefix.out_grid or (0, 0), self.order.side)
      rope = nl.rope_table(cells, self.cfg.head_dim, self.cfg.rope_base)
      k = nl.rotate(k, *nl.spread_rope(rope))
    return k, v

  def _of_targets(self, x: Float[Array, 'B P D']) -> Float[Array, 'B N D']:
    """The feature at the place of each target, of all scales."""
    grid = self.prefix.out_grid or (0, 0)
    sides = [self.order.side]
    if self.order.name == 'scale':
      sides = [(p, p) for p in self.order.patch_nums]
    features = x.reshape(x.shape[0], *grid, x.shape[-1])
    parts = [
      features if side == grid else resize(features, side, 'bilinear_aa')
      for side in sides
    ]
    return jnp.concatenate(
      [part.reshape(x.shape[0], -1, x.shape[-1]) for part in parts], axis=1
    )

  def at(self, memory: Any, read: Int[Array, '*B M']) -> Injection:
    """The injection at some positions.

    Args:
      memory: of the images.
      read: which target each position predicts, -1 for none.
    """
    if self.prefix.inject == 'cross':
      k, v = memory
      return Cross(self.depths, k, v, self.q(), self.out(), self.cfg.norm_eps)
    read = jnp.asarray(read)
    read = read.reshape(-1, 1, read.shape[-1], 1)
    added = jnp.take_along_axis(memory, jnp.maximum(read, 0), axis=2)
    return Fusion(self.depths, jnp.where(read < 0, 0, added))
