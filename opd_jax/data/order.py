"""The order in which rows are used: endless, seeded, by random access."""

from collections.abc import Sequence

import grain

# Without end: more than a run can draw. A stream that grain calls infinite
# cannot be cut into batches of 1, whose number would overflow.
_EPOCHS = 2**31


def endless(
  rows: Sequence[Sequence[int]],
  weights: Sequence[float],
  *,
  seed: int,
  shuffle: bool,
) -> grain.MapDataset:
  """The row at each place of an endless order.

  A source is gone through once before any of its rows comes again, in a new
  order each time. Several sources are interleaved in proportion to their
  weights, each beginning its next epoch when its rows are used up.

  Args:
    rows: of each source.
    weights: of the sources.
    seed: of the order.
    shuffle: false keeps the order of the rows.
  """
  streams = []
  for number, source in enumerate(rows):
    stream = grain.MapDataset.source(source)
    if shuffle:
      # Sources of one size must not be shuffled alike.
      stream = stream.seed((seed + 7919 * number) % 2**32).shuffle()
    streams.append(stream.repeat(_EPOCHS))
  if len(streams) == 1:
    return streams[0]
  # In hundredths of the smallest: grain mixes by integers.
  shares = [round(100 * weight / min(weights)) for weight in weights]
  return grain.MapDataset.mix(streams, shares)
