"""The order in which examples are used: endless, seeded, by random access."""

from collections.abc import Callable, Sequence
from typing import Any

import grain


def endless(
  counts: Sequence[int],
  weights: Sequence[float],
  *,
  seed: int,
  shuffle: bool,
) -> Callable[[int], int]:
  """The index of the example at each place of an endless order.

  The n-th use of a source goes through all of it once before any example comes
  again, in a new order each time. Several sources are interleaved in
  proportion to their weights.

  Args:
    counts: examples of each source; their indices follow each other.
    weights: of the sources.
    seed: of the order.
    shuffle: false keeps the order of the examples.
  """
  parts = []
  first = 0
  for number, count in enumerate(counts):
    part = grain.MapDataset.source(range(first, first + count))
    if shuffle:
      part = part.seed(seed + number).shuffle()
    parts.append(part.repeat())
    first += count
  order: Any = parts[0]
  if len(parts) > 1:
    order = grain.MapDataset.mix(parts, weights=list(weights))
  return lambda place: int(order[place])
