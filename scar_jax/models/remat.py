"""Rematerialisation policies by name: what the backward pass computes again.

In: a block class and a name of `REMAT`. Out: the class whose backward pass
keeps only what the policy names. Used by `models/decoder.py`. Policies save or
move values by the two names below, which blocks and kernels give.
"""

from typing import Any

import flax.linen as nn
import jax

# Results of attention (the kernel's row sums too), and the input of a layer.
ATTENTION = 'attention'
LAYER_INPUT = 'layer_input'

_saved = jax.checkpoint_policies
_POLICIES: dict[str, Any] = {
  # Only the input of each layer is kept.
  'full': None,
  # Results of matrix products, batched ones (attention's) too or not.
  'dots': _saved.checkpoint_dots,
  'dots_no_batch': _saved.checkpoint_dots_with_no_batch_dims,
  # As 'full', but attention is not computed a second time.
  'attention': _saved.save_only_these_names(ATTENTION),
  # As 'full', and the inputs wait in the host's memory.
  'offload': _saved.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[LAYER_INPUT],
    offload_src='device',
    offload_dst='pinned_host',
  ),
}
REMAT = ('none', *_POLICIES)


def rematerialised(block: Any, policy: str, scan: bool) -> Any:
  """The block class under a policy of `REMAT`."""
  if policy == 'none':
    return block
  # Inside a scan the loop itself keeps XLA from merging the recomputation.
  return nn.remat(block, policy=_POLICIES[policy], prevent_cse=not scan)
