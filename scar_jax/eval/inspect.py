"""What a model looks at and is unsure of, while it makes one picture.

In: an `Editor`, a picture and a prompt, where known the true result. Out: an
`Inspection` of numpy arrays. The model's tokens (or those of the truth) go
through it once more, teacher-forced, with the queries and keys of every layer
kept. Called by `scar inspect`, drawn by `inspect_picture.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from scar_jax import compiler
from scar_jax.data.transforms import ImageLike, to_uint8
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.orders.layout import set_mask
from scar_jax.sampling import generate
from scar_jax.sampling_steps import split_scales
from scar_jax.types import Array, Batch, PyTree


@dataclasses.dataclass
class Inspection:
  """One request, seen from inside. N targets, P prefix places.

  Attributes:
    source: condition picture at the model's size.
    result: what the model made, or the truth where that was given.
    grid: (h, w) of `places`.
    prefix_grid: (h, w) of the prefix; (0, 0) without one.
    places: of the targets in prediction order, row-major on `grid`; in the
      scale order those of the last scale, which alone are shown.
    to_prefix: attention of each target to each prefix place, mean over layers
      and heads, in the order of `places`.
    shares: of the attention of each layer: to prefix, text, targets.
    entropy: of each target's distribution, bits, in the order of `places`.
    surprise: `-log2 p` of its token.
    set_entropy: mean over each set, in the order of prediction.
    features: name -> feature map: 'F_s', 'F_c', 'restored', 'F_t'.
    states: name -> prefix states: 'P_s' (in), 'H_s' (out), 'P_t' (target's).
    cosines: name -> cosine of each prefix place: 'H_s, P_t' and 'H_s, P_s'.
  """

  source: UInt8[np.ndarray, 'H W 3']
  result: UInt8[np.ndarray, 'H W 3']
  grid: tuple[int, int]
  prefix_grid: tuple[int, int]
  places: Int[np.ndarray, ' n']
  to_prefix: Float[np.ndarray, 'n P']
  shares: Float[np.ndarray, 'layers 3']
  entropy: Float[np.ndarray, ' n']
  surprise: Float[np.ndarray, ' n']
  set_entropy: Float[np.ndarray, ' K']
  features: dict[str, Float[np.ndarray, 'h w d']]
  states: dict[str, Float[np.ndarray, 'h w D']]
  cosines: dict[str, Float[np.ndarray, 'h w']]

  def summary(self) -> dict[str, Any]:
    """Numbers for a JSON file and the terminal."""
    prefix, text, targets = self.shares.mean(0)
    return {
      'attention_to_prefix': float(prefix),
      'attention_to_text': float(text),
      'attention_to_targets': float(targets),
      'entropy_bits': float(self.entropy.mean()),
      'surprise_bits': float(self.surprise.mean()),
      **{
        f'cosine {name}': float(cosine.mean())
        for name, cosine in self.cosines.items()
      },
    }


def inspect(
  editor: Any,
  image: ImageLike,
  prompt: str = '',
  label: int | None = None,
  target: ImageLike | None = None,
  seed: int = 0,
) -> Inspection:
  """Looks inside one request.

  Args:
    editor: the model.
    image: condition picture.
    prompt: instruction or caption.
    label: class, of a model with classes.
    target: the true result; its tokens are then gone through, not those that
      the model draws.
    seed: of the draws.

  Raises:
    ValueError: see a call of the editor.
  """
  parts, variables, frozen = editor.networks
  # Sets of the training mixture are drawn; those of sampling are shown.
  cfg = dataclasses.replace(editor.cfg.model, train_sets=())
  batch = editor.inputs(image, prompt, label)
  truth = None
  if target is not None:
    truth = editor.inputs(target, prompt, label)['condition']
  perm = None
  if cfg.order == 'random':
    perm = cfg.make_order().draw(jax.random.split(jax.random.key(seed), 1))
  scales, settings = split_scales(editor.cfg.sample)
  run = jax.jit(
    functools.partial(_run, parts, Scar(cfg), settings),
    compiler_options=compiler.options(),
  )
  seeds = jnp.asarray([seed % 2**32], jnp.uint32)
  seen = run(frozen, variables, batch, scales, seeds, perm, truth)
  return _arranged(cfg, jax.tree.map(np.asarray, seen))


def _run(
  parts: Any,
  model: Any,
  settings: Any,
  frozen: PyTree,
  variables: PyTree,
  batch: Batch,
  scales: jax.Array,
  seeds: jax.Array,
  perm: Array | None,
  truth: Array | None,
) -> dict[str, Any]:
  """All arrays that are looked at, of a batch of one; compiled as a whole."""
  cfg, layout = model.cfg, model.cfg.make_layout()
  accumulate = parts.accumulate(frozen)
  cond, _ = parts.conditions(frozen, batch)
  if truth is None:
    made = generate(
      model, variables, cond, seeds, scales, settings, accumulate=accumulate
    )
    tokens = made.tokens
    result = parts.images(frozen, tokens, made.latent)
  else:
    result = truth
    tokens = parts.tokens(frozen, truth).reshape(1, -1)
  target_features = None
  if cfg.aligns:
    both = {**batch, 'target': result}
    _, target_features = parts.conditions(frozen, both, align=True)
  out, state = model.apply(
    variables,
    tokens,
    cond,
    target_features,
    perm=perm,
    accumulate=accumulate,
    mutable=['intermediates'],
  )
  q, k = state['intermediates']['decoder']['layers']['attn']['qk'][0]
  set0 = model.apply(variables, cond, method='set0')
  valid = None
  if set0.valid is not None:
    pad = ((0, 0), (0, layout.target_len))
    valid = jnp.pad(set0.valid, pad, constant_values=True)
  mask = set_mask(layout.set_ids, layout.set_ids, valid)
  rows = layout.logit_index
  seen = {
    'source': batch['condition'],
    'result': result,
    'perm': perm,
    'weights': _weights(q[:, :, rows], k, mask[:, rows])[:, 0],
    'log_p': jax.nn.log_softmax(out.logits.astype(jnp.float32)) / np.log(2),
    'targets': out.targets,
    'P_s': set0.x[:, : layout.prefix_len],
    'H_s': out.hidden[:, : layout.prefix_len],
  }
  if cfg.aligns:
    seen |= {
      'F_s': cond.features,
      'F_c': model.apply(variables, cond.features, method=_compress),
      'restored': out.restored,
      'F_t': target_features,
      'H_s': out.hidden_prefix,
      'P_t': out.align_target,
    }
  return {name: value for name, value in seen.items() if value is not None}


def _compress(model: Any, features: jax.Array) -> jax.Array:
  return model.prefix.compress(features)


def _arranged(cfg: ScarConfig, seen: dict[str, np.ndarray]) -> Inspection:
  """Means and places out of the arrays of `_run`."""
  order, layout = cfg.make_order(), cfg.make_layout()
  log_p, chosen = seen['log_p'][0], seen['targets'][0]
  entropy = -(np.exp2(log_p) * log_p).sum(-1)
  surprise = -log_p[np.arange(len(chosen)), chosen]
  shown, grid = np.arange(len(chosen)), cfg.grid
  places = seen['perm'][0] if 'perm' in seen else shown
  if cfg.order == 'scale':
    side = cfg.patch_nums[-1]
    shown, grid = shown[-(side**2) :], (side, side)
    places = np.arange(side**2)
  weights = seen['weights']  # [layers, N, L]
  p, ends = layout.prefix_len, (layout.prefix_len, layout.set0_len)
  parts = np.split(weights, ends, axis=-1)
  small = cfg.prefix.seq_grid or (0, 0)
  features, states, cosines = {}, {}, {}
  if p:
    features = {
      n: seen[n][0] for n in ('F_s', 'F_c', 'restored', 'F_t') if n in seen
    }
    states = {
      n: seen[n][0].reshape(*small, -1)
      for n in ('P_s', 'H_s', 'P_t')
      if n in seen
    }
    cosines = {
      f'H_s, {n}': _cosine(states['H_s'], states[n])
      for n in ('P_t', 'P_s')
      if n in states
    }
  sets = np.split(entropy, np.cumsum(order.set_sizes)[:-1])
  return Inspection(
    source=to_uint8(seen['source'][0]),
    result=to_uint8(seen['result'][0]),
    grid=grid,
    prefix_grid=small,
    places=places,
    to_prefix=weights[:, shown, :p].mean(0),
    shares=np.stack([part.sum(-1).mean(1) for part in parts], axis=-1),
    entropy=entropy[shown],
    surprise=surprise[shown],
    set_entropy=np.array([values.mean() for values in sets]),
    features=features,
    states=states,
    cosines=cosines,
  )


def _weights(
  q: Float[Array, 'n B N H K'],
  k: Float[Array, 'n B L H K'],
  mask: Any,
) -> Float[Array, 'n B N L']:
  """Attention weights of every layer, mean over its heads; q is scaled."""
  logits = jnp.einsum(
    'nbqhk,nblhk->nbhql', q, k, preferred_element_type=jnp.float32
  )
  lowest = jnp.finfo(jnp.float32).min
  logits = jnp.where(mask[None, :, None], logits, lowest)
  return jax.nn.softmax(logits, axis=-1).mean(2)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / np.maximum(norms, 1e-12)
