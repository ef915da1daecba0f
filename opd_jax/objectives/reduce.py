"""How per-token losses become one number: reductions by name, in one place.

Every reduction is a weighted sum over tokens whose weights depend on masks of
the global batch alone. So they are known before the batch is cut into
micro-batches and chunks, partial sums simply add up, and accumulating over
parts equals the whole.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opd_jax.errors import InputError
from opd_jax.objectives.base import Signals, Term


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """Sizes of the global batch, with the row counts of the rows at hand.

  Attributes:
    tokens_in_row: tokens that carry loss, per row.
    tokens: the same over the global batch.
    rows: rows of the global batch with at least one such token.
  """

  tokens_in_row: Float[Array, " B"]
  tokens: Float[Array, ""]
  rows: Float[Array, ""]

  @classmethod
  def of(cls, loss_mask: Bool[Array, "B T"]) -> "Counts":
    """Counts of a whole batch."""
    in_row = jnp.sum(loss_mask, axis=1, dtype=jnp.float32)
    return cls(
      tokens_in_row=in_row,
      tokens=jnp.sum(in_row),
      rows=jnp.sum(in_row > 0, dtype=jnp.float32),
    )


def _over(count: Float[Array, "..."]) -> Float[Array, "..."]:
  return 1.0 / jnp.maximum(count, 1.0)


def _selected(counts: Counts, size: Float[Array, ""]) -> Float[Array, " B"]:
  share = jnp.where(size > 0, 1.0 / jnp.where(size > 0, size, 1.0), 0.0)
  return share * jnp.ones_like(counts.tokens_in_row)


REDUCTIONS: dict[str, Callable[[Counts], Float[Array, " B"]]] = {
  "token_mean": lambda c: _over(c.tokens) * jnp.ones_like(c.tokens_in_row),
  "seq_mean_token_mean": lambda c: _over(c.rows) * _over(c.tokens_in_row),
  "seq_mean_token_sum": lambda c: (
    _over(c.rows) * jnp.ones_like(c.tokens_in_row)
  ),
  "row_mean": lambda c: _over(c.rows) * jnp.ones_like(c.tokens_in_row),
  "sum": lambda c: jnp.ones_like(c.tokens_in_row),
}
SELECTION_MEAN = "selection_mean"
NAMES = (*REDUCTIONS, SELECTION_MEAN)


def check(reduction: str) -> None:
  """Raises InputError unless `reduction` is a known name."""
  if reduction not in NAMES:
    raise InputError(
      f"reduction must be one of {', '.join(NAMES)}, got {reduction!r}"
    )


def row_scale(
  term: Term, counts: Counts, signals: Signals
) -> Float[Array, " B"]:
  """The weight of every token of a row in the reduced value.

  With m the loss mask, N its number of tokens and R its non-empty rows:

    token_mean           sum_bt m x / N
    seq_mean_token_mean  sum_b (sum_t m x / sum_t m) / R
    seq_mean_token_sum   sum_b (sum_t m x) / R
    row_mean             sum_b x_b / R   over non-empty rows, x of shape [B]
    sum                  sum_bt m x
    selection_mean       sum_bt m x / signals.normalizer[term.normalizer]

  An empty batch or selection has value 0 and gradient 0.
  """
  if term.reduction == SELECTION_MEAN:
    if term.normalizer not in signals.normalizer:
      raise InputError(
        f"term normalizer {term.normalizer!r} is not among the normalizers of "
        f"prepare: {sorted(signals.normalizer)}"
      )
    return _selected(counts, signals.normalizer[term.normalizer])
  check(term.reduction)
  return REDUCTIONS[term.reduction](counts)


def partial_sum(
  term: Term,
  mask: Bool[Array, "B T"],
  counts: Counts,
  signals: Signals,
) -> Float[Array, ""]:
  """What the tokens at hand add to the reduced value of a term."""
  scale = row_scale(term, counts, signals)
  loss = term.loss.astype(jnp.float32)
  if loss.ndim == 1:
    keep = counts.tokens_in_row > 0
    return jnp.sum(jnp.where(keep, loss, 0.0) * scale)
  return jnp.sum(jnp.where(mask, loss, 0.0) * scale[:, None])
