"""AdamW with schedule, clipping, decay mask and parameter groups.

In: the `optim` section, the number of steps, and the parameters' shapes with
their logical axes. Out: one optax transformation for the whole tree.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Float
from optax.contrib import MuonDimensionNumbers

from scar_jax.config import OptimConfig
from scar_jax.sharding import logical_axes, path_name, unbox
from scar_jax.types import Array, PyTree

# Substrings of names that VAR leaves without decay (method.md, section 8),
# and the two of the prefix that we add.
VAR_NO_DECAY = (
  *('cls_token', 'start_token', 'task_token', 'cfg_uncond'),
  *('pos_embed', 'pos_1LC', 'pos_start', 'start_pos', 'lvl_embed'),
  *('gamma', 'beta', 'ada_gss', 'moe_bias', 'scale_mul'),
  *('prefix_pos', 'prefix_lvl'),
)
_LIN0_FLAT = 0.05  # share of the steps after warm-up at the full rate


def learning_rate(
  cfg: OptimConfig, steps: int, peak: float | None = None
) -> Callable[[Any], Float[Array, '']]:
  """Learning rate of each step.

  Linear warm-up from `warmup_start`, then constant, a half cosine, or `lin0`
  (VAR: 5 % of the rest at the peak, then linear), down to `end_scale`.

  Args:
    cfg: the section.
    steps: of the run; the last one has the end value.
    peak: in place of `cfg.lr`.

  Raises:
    ValueError: the warm-up is longer than the run.
  """
  if cfg.warmup_steps > steps:
    raise ValueError(
      f'optim.warmup_steps={cfg.warmup_steps} is above train.steps={steps} '
      '(set --config.optim.warmup_steps)'
    )
  peak = cfg.lr if peak is None else peak
  rest = max(steps - 1 - cfg.warmup_steps, 1)

  def rate(step: Any) -> Float[Array, '']:
    step = jnp.asarray(step, jnp.float32)
    up = step / max(cfg.warmup_steps, 1)
    warm = cfg.warmup_start + (1 - cfg.warmup_start) * up
    u = jnp.clip((step - cfg.warmup_steps) / rest, 0.0, 1.0)
    if cfg.schedule == 'cosine':
      share = 0.5 * (1 + jnp.cos(math.pi * u))
    elif cfg.schedule == 'lin0':
      share = jnp.minimum((1 - u) / (1 - _LIN0_FLAT), 1.0)
    else:
      share = jnp.ones_like(u)
    end = 1.0 if cfg.schedule == 'constant' else cfg.end_scale
    down = end + (1 - end) * share
    return peak * jnp.where(step < cfg.warmup_steps, warm, down)

  return rate


def decay_mask(boxed: PyTree, rule: str = 'ndim') -> PyTree:
  """True where weight decay applies: 2 or more dimensions, unstacked.

  A norm weight of stacked layers is [layers, D]; its own shape, [D], decides.

  Args:
    boxed: abstract parameters with logical axes.
    rule: 'ndim', or 'var' which also exempts `VAR_NO_DECAY` names.
  """
  axes = logical_axes(boxed)

  def decays(path: Any, leaf: Any, names: tuple[str | None, ...]) -> bool:
    name = path_name(path)
    ndim = leaf.ndim - ('layers' in names or 'layers' in name.split('/'))
    spared = rule == 'var' and any(part in name for part in VAR_NO_DECAY)
    return ndim >= 2 and not spared

  return jax.tree_util.tree_map_with_path(decays, unbox(boxed), axes)


def muon_axes(boxed: PyTree) -> PyTree:
  """Input and output axes of every matrix that Muon orthogonalises.

  Kernels of linear maps; a further axis (stacked layers; query, key and value)
  counts as matrices side by side. None for what is left to AdamW (there with
  the momentum of Nesterov): tables, the head over the vocabulary, convolutions,
  vectors.

  Args:
    boxed: abstract parameters with logical axes.
  """

  def axes(path: Any, leaf: Any, names: tuple[str | None, ...]) -> Any:
    del leaf
    if path_name(path).split('/')[-1] != 'kernel' or 'vocab' in names:
      return None
    first, last = int(names[0] == 'layers'), len(names) - 1
    if names[last] == 'embed':
      return MuonDimensionNumbers(tuple(range(first, last)), (last,))
    if names[first] != 'embed':
      return None
    out = [i for i in range(first + 1, last + 1) if names[i] is not None]
    return MuonDimensionNumbers((first,), tuple(out)) if out else None

  return jax.tree_util.tree_map_with_path(
    axes, unbox(boxed), logical_axes(boxed)
  )


def _groups(cfg: OptimConfig, params: PyTree, labels: PyTree | None) -> PyTree:
  """Group name of each parameter, the frozen ones by config included."""

  def group(path: Any, _: Any, label: str) -> str:
    frozen = any(part in path_name(path) for part in cfg.freeze)
    return 'frozen' if frozen else label

  labels = labels or jax.tree.map(lambda _: 'main', params)
  return jax.tree_util.tree_map_with_path(group, params, labels)


def _clip(
  limit: float, all_of_them: bool
) -> optax.GradientTransformationExtraArgs:
  """Scales gradients whose global norm is above the limit down to it.

  As `optax.clip_by_global_norm`, but by one factor: XLA fuses a product into
  each of its readers, and writes the quotient of optax out, a copy of all
  gradients.

  Args:
    limit: of the norm.
    all_of_them: every gradient comes here, so that their norm may be given to
      `update` as `norm`, where it is known already.
  """

  def update(
    grads: PyTree, state: Any, params: Any = None, *, norm: Any = None, **_: Any
  ) -> Any:
    del params
    if norm is None or not all_of_them:
      norm = optax.tree.norm(grads)
    factor = jnp.minimum(1.0, limit / norm)
    return jax.tree.map(lambda g: g * factor, grads), state

  return optax.GradientTransformationExtraArgs(
    lambda _: optax.EmptyState(), update
  )


def make_optimizer(
  cfg: OptimConfig, steps: int, boxed: PyTree, labels: PyTree | None = None
) -> optax.GradientTransformation:
  """The optimiser of a run.

  Each group is clipped by its own global norm. Group 'frozen' has no moments
  and never changes.

  Args:
    cfg: the section.
    steps: of the run.
    boxed: abstract parameters with logical axes.
    labels: group name of each parameter; all 'main' by default.

  Raises:
    ValueError: `optim.group_lr` names a group that no parameter is in, or
      `optim.freeze` a part that no path has.
  """
  params = unbox(boxed)
  names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
  for part in cfg.freeze:
    if not any(part in name for name in names):
      raise ValueError(f'optim.freeze={part!r} matches none of: {names}')
  groups = _groups(cfg, params, labels)
  known = set(jax.tree.leaves(groups))
  peaks: Mapping[str, float] = dict(cfg.group_lr)
  if lost := sorted(set(peaks) - known):
    raise ValueError(
      f'optim.group_lr names {lost}; the groups are {sorted(known)}'
    )

  def chain(group: str) -> optax.GradientTransformation:
    if group == 'frozen':
      return optax.set_to_zero()
    clip = [_clip(cfg.clip, known == {'main'})] if cfg.clip else []
    rate = learning_rate(cfg, steps, peaks.get(group))
    if cfg.name == 'muon':
      update = optax.contrib.muon(
        rate,
        weight_decay=cfg.weight_decay,
        weight_decay_mask=mask,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        adam_weight_decay=cfg.weight_decay,
        muon_weight_dimension_numbers=muon_axes(boxed),
        # Updates as large as those of AdamW, so that one rate fits both.
        consistent_rms=0.2,
      )
    else:
      update = optax.adamw(
        rate,
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=mask,
      )
    return optax.chain(*clip, update)

  def mask(tree: PyTree) -> PyTree:
    # optax hands over one group with the others' leaves masked out.
    whole = decay_mask(boxed, cfg.no_decay)
    return jax.tree.map(
      lambda m, x: m if not isinstance(x, optax.MaskedNode) else x,
      whole,
      tree,
    )

  if known == {'main'}:
    return chain('main')
  return optax.multi_transform({g: chain(g) for g in sorted(known)}, groups)
