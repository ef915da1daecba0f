"""Which tokens of the completions carry loss."""

import dataclasses
from typing import Literal

from opd_jax.config.checks import require

# What these rank by is normalised first; the others rank by one value as it is.
_NORMALIZED = ("soft_or", "q3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionConfig:
  """Loss on the tokens that matter most, whatever the objective (TIP).

  The formulas, and what it saves, are in [selection.md](selection.md).

  Attributes:
    name: what the tokens are ranked by.
    fraction: rho, of the tokens, in (0, 1]; exact for up to four decimals.
    norm_scope: whose tokens quantile, minimum and maximum are of, with which
      "soft_or" and "q3" normalise: all of the batch, or the rollout's own.
    select_scope: whether rho is of the tokens of each rollout, or of the whole
      batch; the latter saves no memory.
    cap: the quantile of the entropies that they are cut at, in (0, 1], for
      "soft_or" and "q3".
  """

  name: Literal[
    "soft_or", "q3", "entropy", "divergence", "entropy_sampling"
  ] = "soft_or"
  fraction: float = 0.5
  norm_scope: Literal["batch", "rollout"] = "batch"
  select_scope: Literal["rollout", "batch"] = "rollout"
  cap: float = 0.98

  def __post_init__(self):
    for name, meaning in (
      ("fraction", "1 for all tokens"),
      ("cap", "1 for no cap"),
    ):
      value = getattr(self, name)
      require(
        0 < value <= 1,
        f"selection.{name} must be in (0, 1], got {value}; use {meaning}",
      )
    require(
      self.fraction >= 1e-4,
      f"selection.fraction must be at least 0.0001, got {self.fraction}: it is "
      "exact for four decimals",
    )
    if self.name not in _NORMALIZED:
      for field in dataclasses.fields(self):
        value = getattr(self, field.name)
        require(
          field.name not in ("norm_scope", "cap") or value == field.default,
          f"selection.{field.name} = {value!r} has no meaning with "
          f"selection.name = {self.name!r}, whose ranking needs no "
          "normalisation; leave it out, or take soft_or or q3",
        )
