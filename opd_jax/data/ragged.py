"""Rows of ids as two arrays, so that a million of them can be sent."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Rows of different lengths.

  Attributes:
    lengths: of the rows.
    ids: of all rows, one behind the other.
  """

  lengths: np.ndarray
  ids: np.ndarray

  @classmethod
  def of(cls, rows: Sequence[np.ndarray]) -> "Ragged":
    """Joins rows of int32."""
    return cls(
      lengths=np.array([len(row) for row in rows], np.int32),
      ids=np.concatenate([np.zeros(0, np.int32), *rows]),
    )

  def rows(self) -> list[np.ndarray]:
    """The rows again, as parts of one array."""
    return np.split(self.ids, np.cumsum(self.lengths)[:-1])[: len(self.lengths)]
