"""Mesh axes, the vocabulary of logical axes, and where arrays are placed.

Parameters and activations are annotated with logical axis names where they
are defined; one table maps those names to mesh axes. Flax does not object to
a misspelt logical name (the array is silently replicated), so names enter only
through `annotated` and `constrain`, which do.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

MESH_AXES = ('replica', 'data', 'fsdp', 'tensor')

# Logical axis -> mesh axes. Each name appears once: no rule can shadow another.
LOGICAL_RULES: tuple[tuple[str, Any], ...] = (
  ('batch', ('replica', 'data', 'fsdp')),
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  ('conv_out', 'fsdp'),
  ('layers', None),
  ('length', None),
  ('head_dim', None),
  ('act_embed', None),
  ('act_heads', 'tensor'),
  ('act_mlp', 'tensor'),
  ('act_vocab', 'tensor'),
)
_VOCABULARY = frozenset(name for name, _ in LOGICAL_RULES)


def _checked(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  unknown = [a for a in axes if a is not None and a not in _VOCABULARY]
  if unknown:
    raise ValueError(
      f'unknown logical axis {unknown} in {axes}; '
      f'accepted: {sorted(_VOCABULARY)} or None'
    )
  return axes


def annotated(
  init: Callable[..., Any], *axes: str | None
) -> Callable[..., Any]:
  """An initialiser whose parameter carries logical axis names.

  Args:
    init: any Flax initialiser.
    *axes: one logical name (or None) for each dimension of the parameter.

  Raises:
    ValueError: a name is not in the vocabulary.
  """
  return nn.with_logical_partitioning(init, _checked(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation to its logical sharding; a no-op off-mesh."""
  return nn.with_logical_constraint(x, _checked(axes))
