"""Building blocks that the frozen and small encoders share.

In and out: token sequences `[B, L, D]`. Linear maps keep head axes in their
parameters (`[D, 3, H, K]`), so that `tensor` splits heads, never q from k.
Norms and softmax run in float32, matrix products in the module's dtype.
Used by every file of this folder.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scar_jax.models.attention import choose_backend, weighted
from scar_jax.models.dense import Dense
from scar_jax.models.layers import layer_norm
from scar_jax.models.resize import resize
from scar_jax.models.unstacked import LAYERS, layer_name
from scar_jax.sharding import annotated, constrain, platform

Act = Callable[[jax.Array], jax.Array]
INIT = nn.initializers.truncated_normal(0.02)


def gelu_exact(x: jax.Array) -> jax.Array:
  """GELU by the error function, as torch's default."""
  return nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU's tanh form, `gelu_new` of Hugging Face."""
  return nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
  """`x sigmoid(1.702 x)`, OpenAI CLIP's activation."""
  return x * nn.sigmoid(1.702 * x)


def linear(
  out: tuple[int, ...], axes: tuple[str | None, ...], **kw: Any
) -> Dense:
  """`x W + b` to the axes `out`; `axes` names all kernel axes."""
  given = dict(in_dims=len(axes) - len(out), use_bias=True, kernel_init=INIT)
  return Dense(out, axes, **(given | kw))


class LayerNorm(nn.Module):
  """Over the last axis; without parameters unless `affine`."""

  eps: float = 1e-6
  affine: bool = True
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    x = layer_norm(x, self.eps)
    if self.affine:
      size = (x.shape[-1],)
      ones = annotated(nn.initializers.ones, None)
      zeros = annotated(nn.initializers.zeros, None)
      x = x * self.param('scale', ones, size) + self.param('bias', zeros, size)
    return x.astype(self.dtype)


def biased_attention(
  q: Float[Array, 'B L H K'],
  k: Float[Array, 'B S H K'],
  v: Float[Array, 'B S H K'],
  scale: float,
  bias: Float[Array, '_ H L S'] | None = None,
  mask: Bool[Array, '_ L S'] | None = None,
) -> Float[Array, 'B L H K']:
  """Softmax attention with an additive bias; a fully masked row is uniform."""
  cpu = platform() == 'cpu'
  # Heads first: a batch of plain matrix products, 4 times faster on CPUs. In
  # float32 they sum over rows a third faster than over columns.
  rows = cpu and q.dtype == jnp.float32
  to = (0, 2, 3, 1) if rows else (0, 2, 1, 3)
  q, k, v = q.transpose(to), k.transpose(to), v.transpose(0, 2, 1, 3)
  logits = jnp.einsum(
    'bhkl,bhks->bhls' if rows else 'bhlk,bhsk->bhls',
    q,
    k,
    preferred_element_type=jnp.float32,
  )
  logits = logits * scale
  if bias is not None:
    logits = logits + bias
  if mask is not None:
    lowest = jnp.finfo(jnp.float32).min
    logits = jnp.where(mask[:, None], logits, lowest)
  if cpu:
    out, _, _ = weighted(logits, v, 'bhsk')
  else:
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum('bhls,bhsk->bhlk', weights, v)
  return out.transpose(0, 2, 1, 3)


def _attention(q, k, v, scale, mask):
  """By a kernel where that can: logits of 1025 positions fill the memory."""
  one_set = np.zeros(q.shape[1], np.int32)
  backend = choose_backend(
    'auto', platform(), one_set, head_dim=q.shape[-1], dtype=str(q.dtype)
  )
  if mask is not None or backend == 'xla':
    return biased_attention(q, k, v, scale, mask=mask)
  # Pallas takes a while to import, and most runs do without it.
  from scar_jax.models.kernels import KERNELS

  kernel = KERNELS[backend]
  return kernel(q, k, v, scale, None, set_ids=one_set, padding=None)


class SelfAttention(nn.Module):
  """q, k, v from one product with bias, then heads, then `out`."""

  heads: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B L D'],
    mask: Bool[Array, '_ L L'] | None = None,
  ) -> Float[Array, 'B L D']:
    D = x.shape[-1]
    K = D // self.heads
    q, k, v = linear(
      (3, self.heads, K), ('embed', None, 'heads', 'head_dim'),
      dtype=self.dtype, apart=True, name='qkv',
    )(x)  # fmt: skip
    x = _attention(q, k, v, K**-0.5, mask)
    return linear(
      (D,), ('heads', 'head_dim', 'embed'), dtype=self.dtype, name='out'
    )(x)


class Mlp(nn.Module):
  """`fc2(act(fc1 x))`, both with bias."""

  hidden: int
  act: Act = gelu_exact
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
    kw = dict(dtype=self.dtype)
    up = linear((self.hidden,), ('embed', 'mlp'), name='fc1', **kw)(x)
    out = (x.shape[-1],)
    return linear(out, ('mlp', 'embed'), name='fc2', **kw)(self.act(up))


class SwiGLU(nn.Module):
  """`w3(silu(gate) * value)`, [gate | value] from one product w12."""

  hidden: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
    kw = dict(dtype=self.dtype)
    both = linear((2, self.hidden), ('embed', None, 'mlp'), name='w12', **kw)(x)
    gated = nn.silu(both[..., 0, :]) * both[..., 1, :]
    return linear((x.shape[-1],), ('mlp', 'embed'), name='w3', **kw)(gated)


class Block(nn.Module):
  """Attention, then a feed-forward, each behind a norm and added to the input.

  Attributes:
    heads: of the attention.
    hidden: width of the feed-forward.
    ffn: 'mlp' or 'swiglu'.
    act: of an 'mlp'.
    layerscale: start of a factor per channel on each branch; None has none.
    norm_eps: of both norms.
    dtype: of matrix products.
  """

  heads: int
  hidden: int
  ffn: str = 'mlp'
  act: Act = gelu_exact
  layerscale: float | None = None
  norm_eps: float = 1e-6
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, jax.Array],
    slot: jax.Array,
    mask: Bool[Array, '_ L L'] | None,
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    x, kept = carry

    def branch(name: str, body: Callable[[jax.Array], jax.Array], x: jax.Array):
      norm = LayerNorm(self.norm_eps, dtype=self.dtype, name=f'norm{name}')
      y = body(norm(x))
      if self.layerscale is not None:
        init = annotated(nn.initializers.constant(self.layerscale), None)
        y = y * self.param(f'ls{name}', init, (x.shape[-1],))
      return (x + y).astype(x.dtype)

    attn = SelfAttention(self.heads, self.dtype, name='attn')
    if self.ffn == 'swiglu':
      mlp = SwiGLU(self.hidden, self.dtype, name='mlp')
    else:
      mlp = Mlp(self.hidden, self.act, self.dtype, name='mlp')
    x = branch('1', lambda y: attn(y, mask), x)
    x = branch('2', mlp, x)
    x = constrain(x, 'batch', None, 'act_embed')
    # Only the wanted outputs take memory; other layers name no slot.
    if kept.shape[0]:
      kept = kept.at[slot].set(x, mode='drop')
    return (x, kept), None


def make_layers(owner: nn.Module, depth: int, **fields: Any) -> Any:
  """A stack of `depth` blocks, the submodule `layers` of its owner.

  A list of blocks where the owner's parameters are apart, see `unstacked.py`.
  """
  if owner.has_variable('params', layer_name(0)):
    return [Block(**fields, name=layer_name(i)) for i in range(depth)]
  return nn.scan(
    Block,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=(0, nn.broadcast),
    length=depth,
    metadata_params={nn.PARTITION_NAME: LAYERS},
  )(**fields, name=LAYERS)


def check_layers(layers: tuple[int, ...], depth: int) -> None:
  """Refuses layers that a network does not have.

  Raises:
    ValueError: an index outside 0 to depth - 1.
  """
  wrong = [i for i in layers if not 0 <= i < depth]
  if wrong:
    raise ValueError(f'layer {wrong} of {depth}; accepted: 0 to {depth - 1}')


def run_layers(
  stack: Any,
  x: Float[Array, 'B L D'],
  depth: int,
  layers: tuple[int, ...] = (),
  mask: Bool[Array, '_ L L'] | None = None,
) -> tuple[Float[Array, 'B L D'], Float[Array, 'n B L D']]:
  """The last output of a stack, and the outputs of the wanted layers.

  Raises:
    ValueError: an unknown layer.
  """
  check_layers(layers, depth)
  slots = [layers.index(i) if i in layers else len(layers)
           for i in range(depth)]  # fmt: skip
  kept = jnp.zeros((len(layers), *x.shape), x.dtype)
  if isinstance(stack, Sequence):
    for block, slot in zip(stack, slots, strict=True):
      (x, kept), _ = block((x, kept), slot, mask)
    return x, kept
  (x, kept), _ = stack((x, kept), jnp.array(slots), mask)
  return x, kept


class PatchEmbed(nn.Module):
  """Patches to embeddings, row-major: a convolution whose stride is its size.

  Written as one matrix product, which is the same sum and much faster on CPU.
  """

  patch: int
  width: int
  bias: bool = True
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, images: Float[Array, 'B H W C']
  ) -> Float[Array, 'B h w D']:
    B, H, W, C = images.shape
    h, w = patch_grid((H, W), self.patch)
    p = self.patch
    x = images.reshape(B, h, p, w, p, C).transpose(0, 1, 3, 2, 4, 5)
    return linear(
      (self.width,), (None, None, None, 'embed'), use_bias=self.bias,
      dtype=self.dtype, name='proj',
    )(x)  # fmt: skip


def patch_grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
  """(rows, columns) of patches, in whole numbers: 546 pixels by 14 is 39.

  Raises:
    ValueError: a side is not a multiple of the patch; patches are never cut
      off or padded in silence.
  """
  bad = [n for n in size if n % patch or n < patch]
  if bad:
    near = sorted({max(n // patch + i, 1) * patch for n in bad for i in (0, 1)})
    raise ValueError(
      f'encoder input of {size[0]}x{size[1]} pixels (rows x columns) with '
      f'patch {patch}; accepted: multiples of {patch}, near: '
      f'{", ".join(map(str, near))} (set --config.model.size)'
    )
  return size[0] // patch, size[1] // patch


POS_INTERP = ('offset0.1', 'size', 'size_aa')


def fit_positions(
  table: Float[Array, 'H W D'], grid: tuple[int, int], method: str
) -> Float[Array, 'h w D']:
  """A learned position table at another grid; its own grid is unchanged.

  Args:
    table: learned positions.
    grid: (rows, columns) wanted.
    method: 'offset0.1' is bicubic with a factor of (n + 0.1) / side, as
      facebookresearch/dinov2; 'size' bicubic by size, as Hugging Face;
      'size_aa' with antialias, as dinov2 with registers.

  Raises:
    ValueError: unknown method.
  """
  if method not in POS_INTERP:
    raise ValueError(
      f'pos_interp={method!r}; accepted: {", ".join(POS_INTERP)} '
      '(set --config.model.pos_interp)'
    )
  side = table.shape[:2]
  if grid == side:
    return table
  mode = 'bicubic_aa' if method == 'size_aa' else 'bicubic'
  factor = None
  if method == 'offset0.1':
    factor = (grid[0] + 0.1) / side[0], (grid[1] + 0.1) / side[1]
  return resize(table, grid, mode, factor)


def token_positions(
  rows: Float[Array, 'M D'], side: int, grid: tuple[int, int], method: str
) -> Float[Array, 'L D']:
  """Position rows of the class token, then of the patches of a grid.

  Args:
    rows: the learned ones: class token, then `side` x `side` patches.
    side: of the learned table.
    grid: (rows, columns) wanted.
    method: see `fit_positions`.
  """
  rows = jnp.asarray(rows, jnp.float32)
  width = rows.shape[-1]
  table = fit_positions(rows[1:].reshape(side, side, width), grid, method)
  return jnp.concatenate([rows[:1], table.reshape(-1, width)])
