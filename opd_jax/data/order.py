"""The order in which rows are used: endless, seeded, by random access."""

from collections.abc import Sequence

import grain

# Without end: more than a run can draw. A stream that grain calls infinite
# cannot be cut into batches of 1, whose number would overflow.
_EPOCHS = 2**31


def endless(
  sources: Sequence[Sequence[int]],
  weights: Sequence[float],
  *,
  seed: int,
  shuffle: bool,
) -> grain.MapDataset:
  """Rows without end: each source in its own order, mixed by weights.

  A source begins its next epoch, in a new order, when its rows are used up.

  Args:
    sources: indices of the rows of each.
    weights: of the sources.
    seed: of the order.
    shuffle: false keeps the order of the rows.
  """
  streams = []
  for number, rows in enumerate(sources):
    stream = grain.MapDataset.source(rows)
    if shuffle:
      # Sources of one size must not be shuffled alike.
      stream = stream.seed((seed + 7919 * number) % 2**32).shuffle()
    streams.append(stream.repeat(_EPOCHS))
  if len(streams) == 1:
    return streams[0]
  # Hundredths of the smallest: grain mixes by whole numbers.
  shares = [round(100 * weight / min(weights)) for weight in weights]
  return grain.MapDataset.mix(streams, shares)
