"""Which record lies at which place of the endless, shuffled sample stream.

In: number of records, seed, places. Out: record indices. A pure function, so
a place alone is the state of the input: any number of hosts or workers, and
any batch size, read the same stream from any place. Each epoch is another
permutation, and no table is kept.
"""

import numpy as np
from jaxtyping import Int64

_ROUNDS = 8


def records_at(
  places: Int64[np.ndarray, ' n'], count: int, seed: int, shuffle: bool = True
) -> Int64[np.ndarray, ' n']:
  """Record index at each place of the stream; place n is in epoch n // count.

  Args:
    places: >= 0.
    count: number of records, >= 1.
    seed: of the shuffle; each epoch is shuffled anew.
    shuffle: False keeps the order of the source.
  """
  epochs, within = np.divmod(places, count)
  if not shuffle:
    return within
  out = np.empty_like(within)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    out[here] = _permute(within[here], count, seed, int(epoch))
  return out


def _permute(x: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
  """A keyed permutation of range(count): Feistel network, cycle walking."""
  half = max(1, ((count - 1).bit_length() + 1) // 2)
  shift, low = np.uint64(half), np.uint64((1 << half) - 1)
  entropy = [seed & 0xFFFFFFFFFFFFFFFF, epoch]
  keys = np.random.SeedSequence(entropy).generate_state(_ROUNDS, np.uint64)
  x = x.astype(np.uint64)
  # The network permutes the next power of four; what falls outside of
  # range(count) walks on along its cycle until it is inside again.
  outside = np.ones(x.shape, np.bool_)
  while outside.any():
    y = x[outside]
    left, right = y >> shift, y & low
    for key in keys:
      left, right = right, left ^ (_mix(right + key) & low)
    x[outside] = (left << shift) | right
    outside = x >= count
  return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
  """Spreads every bit over all 64 (the finaliser of SplitMix64)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
