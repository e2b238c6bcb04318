"""Which record lies at which place of the endless, shuffled sample stream.

In: number of records, seed, places. Out: record indices. A pure function, so
a place alone is the state of the input: any number of hosts or workers, and
any batch size, read the same stream from any place. Each epoch is another
permutation, and no table is kept.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

_ROUNDS = 8
# Places over which a mixture has exactly its shares; decimal weights are exact.
MIX_BLOCK = 1000
_MIX = 0x6D6978  # sets the order of blocks apart from that of records
_GROUPS = 0x677270  # and that of batches


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


def places_of(
  records: Int64[np.ndarray, ' n'], count: int, seed: int, epoch: int
) -> Int64[np.ndarray, ' n']:
  """Where records lie in one epoch of the shuffled stream of `records_at`.

  Args:
    records: 0 <= record < count.
    count: number of records.
    seed: of the shuffle.
    epoch: >= 0.
  """
  within = _permute(records, count, seed, epoch, backwards=True)
  return epoch * count + within


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
  """How many of `MIX_BLOCK` places each part of a mixture gets; at least one.

  Raises:
    ValueError: a weight that is not positive, or more parts than places.
  """
  if not all(w > 0 for w in weights) or not 0 < len(weights) <= MIX_BLOCK:
    raise ValueError(
      f'weights {tuple(weights)} of data.mixture; accepted: 1 to {MIX_BLOCK}'
      ' numbers > 0'
    )
  exact = np.array(weights, np.float64) / sum(weights) * MIX_BLOCK
  shares = np.maximum(1, np.floor(exact + 1e-9)).astype(int)
  # The largest remainders get what is left; the largest shares give it up.
  while shares.sum() < MIX_BLOCK:
    shares[np.argmax(exact - shares)] += 1
  while shares.sum() > MIX_BLOCK:
    shares[np.argmax(shares)] -= 1
  return tuple(shares.tolist())


def mixed_at(
  places: Int64[np.ndarray, ' n'],
  counts: Sequence[int],
  shares: Sequence[int],
  seed: int,
) -> Int64[np.ndarray, ' n']:
  """Record index at each place of a mixture; its parts lie one after another.

  Each block of `MIX_BLOCK` places holds every part as often as its share, in an
  order of its own. Each part runs through its own stream of `records_at`: a
  record comes again only when all of its part have come.

  Args:
    places: >= 0.
    counts: records of each part, >= 1.
    shares: of `shares_of`.
    seed: of the order of blocks and records.
  """
  parts, own = _own_places(places, shares, seed)
  out = np.empty_like(places)
  for part, count in enumerate(counts):
    here = parts == part
    found = records_at(own[here], count, seed + part)
    out[here] = found + sum(counts[:part])
  return out


def mixed_epochs(
  places: Int64[np.ndarray, ' n'],
  counts: Sequence[int],
  shares: Sequence[int],
  seed: int,
) -> Int64[np.ndarray, ' n']:
  """How often the part at each place of `mixed_at` was read whole before."""
  parts, own = _own_places(places, shares, seed)
  return own // np.asarray(counts, np.int64)[parts]


def batch_of_group(
  number: int, counts: Sequence[int], batch: int, seed: int
) -> tuple[int, Int64[np.ndarray, ' batch']]:
  """The group that a global batch is made of, and its places there.

  Every group runs through an endless stream of its own (`records_at` with its
  count), which is cut into batches: none is left over at the end of an epoch,
  and a record comes again only when all of its group have come. Epoch e of the
  whole has the batches of each group that begin in epoch e of the group, in an
  order drawn for it: groups keep pace to a batch, however small they are.

  Args:
    number: of the batch, >= 0.
    counts: records of each group; one at least is above 0.
    batch: records of a batch.
    seed: of the order.
  """
  total = sum(counts)

  def begun(epoch: int) -> list[int]:
    """Batches of each group that begin before an epoch."""
    return [-(-epoch * count // batch) for count in counts]

  # Between number of records and number of batches lies a part of a batch for
  # each group.
  low = max(0, (number - len(counts)) * batch // total)
  high = number * batch // total + 1
  epoch = (
    bisect.bisect_right(
      range(high + 1), number, low, high, key=lambda e: sum(begun(e))
    )
    - 1
  )
  first, last = begun(epoch), begun(epoch + 1)
  widths = np.subtract(last, first)
  ends = np.cumsum(widths)
  within = np.array([number - sum(first)], np.int64)
  drawn = _permute(within, int(ends[-1]), seed ^ _GROUPS, epoch)[0]
  group = int(np.searchsorted(ends, drawn, side='right'))
  own = first[group] + int(drawn - (ends - widths)[group])
  return group, own * batch + np.arange(batch, dtype=np.int64)


def _own_places(
  places: np.ndarray, shares: Sequence[int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """The part at each place of a mixture, and the place in its own stream."""
  widths = np.asarray(shares, np.int64)
  ends = np.cumsum(widths)
  blocks, within = np.divmod(places, MIX_BLOCK)
  drawn = np.empty_like(within)
  for block in np.unique(blocks):
    here = blocks == block
    # Another permutation than any epoch's.
    drawn[here] = _permute(within[here], MIX_BLOCK, seed ^ _MIX, int(block))
  parts = np.searchsorted(ends, drawn, side='right')
  own = blocks * widths[parts] + drawn - (ends - widths)[parts]
  return parts, own


def _permute(
  x: np.ndarray, count: int, seed: int, epoch: int, backwards: bool = False
) -> np.ndarray:
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
    for key in keys[::-1] if backwards else keys:
      if backwards:
        left, right = right ^ (_mix(left + key) & low), left
      else:
        left, right = right, left ^ (_mix(right + key) & low)
    x[outside] = (left << shift) | right
    outside = x >= count
  return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
  """Spreads every bit over all 64 (the finaliser of SplitMix64)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
