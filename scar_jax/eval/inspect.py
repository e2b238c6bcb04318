"""What a model looks at and is unsure of, while it makes one picture.

In: an `Editor`, a picture and a prompt, where known the true result. Out: an
`Inspection` of numpy arrays. The model's tokens (or those of the truth) go
through it once more, teacher-forced, with the queries and keys of every layer
kept. Called by `scar inspect`, drawn by `inspect_picture.py`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from scar_jax.data.transforms import ImageLike, to_uint8
from scar_jax.models.conditions import Conditions
from scar_jax.models.scar import Scar
from scar_jax.orders.layout import set_mask
from scar_jax.sampling import generate, split_scales
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
  cfg = editor.cfg.model
  model = Scar(cfg)
  batch = editor.inputs(image, prompt, label)
  cond, _ = jax.jit(parts.conditions)(frozen, batch)
  accumulate = parts.accumulate(frozen)
  perm = None
  if cfg.order == 'random':
    perm = cfg.make_order().draw(jax.random.split(jax.random.key(seed), 1))
  if target is None:
    scales, settings = split_scales(editor.cfg.sample)
    draw = jax.jit(
      lambda variables, cond, seeds: generate(
        model, variables, cond, seeds, scales, settings, accumulate=accumulate
      )
    )
    seeds = jnp.asarray([seed % 2**32], jnp.uint32)
    made = draw(variables, cond, seeds)
    tokens = made.tokens
    result = parts.images(frozen, tokens, made.latent)
  else:
    result = editor.inputs(target, prompt, label)['condition']
    tokens = parts.tokens(frozen, result).reshape(1, -1)
  made = _Made(batch, cond, tokens, result, perm)
  return _seen(parts, frozen, model, variables, made)


class _Made(NamedTuple):
  """A request and its result; one row each."""

  batch: Batch
  cond: Conditions
  tokens: Array
  result: Array
  perm: Array | None


def _seen(
  parts: Any, frozen: PyTree, model: Scar, variables: PyTree, made: _Made
) -> Inspection:
  batch, cond, tokens, result, perm = made
  cfg = model.cfg
  order, layout = cfg.make_order(), cfg.make_layout()
  target_features = None
  if cfg.aligns:
    _, target_features = parts.conditions(frozen, batch, result)

  @jax.jit
  def run(variables: PyTree, cond: Conditions, tokens: Array) -> Any:
    out, state = model.apply(
      variables,
      tokens,
      cond,
      target_features,
      perm=perm,
      choice=jnp.zeros((), jnp.int32) if cfg.train_sets else None,
      accumulate=parts.accumulate(frozen),
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
    weights = _weights(q[:, :, rows], k, mask[:, rows])
    return out, weights[:, 0], set0.x[0, : layout.prefix_len]

  out, weights, prefix = run(variables, cond, tokens)
  log_p = jax.nn.log_softmax(out.logits[0].astype(jnp.float32)) / np.log(2)
  entropy = np.asarray(-(jnp.exp2(log_p) * log_p).sum(-1))
  chosen = np.asarray(out.targets[0])
  surprise = -np.asarray(log_p)[np.arange(len(chosen)), chosen]
  weights = np.asarray(weights)  # [layers, N, L]
  ends = np.cumsum(order.set_sizes)
  shown, grid = np.arange(len(chosen)), cfg.grid
  places = shown if perm is None else np.asarray(perm[0])
  if cfg.order == 'scale':
    side = cfg.patch_nums[-1]
    shown, grid = shown[-(side**2) :], (side, side)
    places = np.arange(side**2)
  p = layout.prefix_len
  shares = np.stack(
    [
      weights[..., :p].sum(-1).mean(1),
      weights[..., p : layout.set0_len].sum(-1).mean(1),
      weights[..., layout.set0_len :].sum(-1).mean(1),
    ],
    axis=-1,
  )
  features, states, cosines = _prefix(
    model, variables, cond, target_features, out, np.asarray(prefix)
  )
  return Inspection(
    source=to_uint8(np.asarray(batch['condition'][0])),
    result=to_uint8(np.asarray(result[0])),
    grid=grid,
    prefix_grid=cfg.prefix.out_grid if p else (0, 0),
    places=places,
    to_prefix=weights[:, shown, :p].mean(0),
    shares=shares,
    entropy=entropy[shown],
    surprise=surprise[shown],
    set_entropy=np.array([e.mean() for e in np.split(entropy, ends[:-1])]),
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


def _prefix(
  model: Scar,
  variables: PyTree,
  cond: Conditions,
  target_features: Array | None,
  out: Any,
  prefix: np.ndarray,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Feature maps, prefix states, and cosines between these."""
  cfg = model.cfg
  if cfg.prefix.compress == 'off':
    return {}, {}, {}
  grid = cfg.prefix.out_grid

  def placed(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32).reshape(*grid, -1)

  features, states = {}, {'P_s': placed(prefix)}
  states['H_s'] = placed(out.hidden[0, : len(prefix)])
  if cfg.aligns:

    def compress(module: Scar, x: Array) -> Array:
      return module.prefix.compress(x)

    features['F_s'] = np.asarray(cond.features[0], np.float32)
    compressed = model.apply(variables, cond.features, method=compress)
    features['F_c'] = np.asarray(compressed[0], np.float32)
    if out.restored is not None:
      features['restored'] = np.asarray(out.restored[0], np.float32)
    features['F_t'] = np.asarray(target_features[0], np.float32)
    states['H_s'] = placed(out.hidden_prefix[0])
    states['P_t'] = placed(out.align_target[0])
  cosines = {
    f'H_s, {name}': _cosine(states['H_s'], states[name])
    for name in ('P_t', 'P_s')
    if name in states
  }
  return features, states, cosines


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / np.maximum(norms, 1e-12)
