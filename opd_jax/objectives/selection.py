"""Tokens chosen by their rank in the whole batch, or in their own row.

For what sees the global batch: `prepare` of an objective, and the selector.
Everything here is a sum over tokens, so that it is the same however the batch
is spread over devices, and needs no sort and no copy of the batch on each of
them.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


def top_fraction(
  values: Float[Array, "B T"], mask: Bool[Array, "B T"], fraction: float
) -> Bool[Array, "B T"]:
  """The tokens of the largest values: 1 + floor(fraction (n - 1)) of n.

  These are the tokens at or above the (1 - fraction)-quantile with linear
  interpolation, counted instead of compared, so that rounding of the quantile
  cannot drop one. Ties with the last one are chosen too.

  Args:
    values: finite where `mask` is true, anything elsewhere; no gradient.
    mask: the n tokens to choose from.
    fraction: in [0, 1]; exact for up to four decimals.
  """
  total = jnp.sum(mask, dtype=jnp.int32, keepdims=True)
  count, _ = _share(jnp.maximum(total - 1, 0), fraction)
  return mask & (_ordered(values) >= _kth_largest(values, mask, 1 + count))


def largest(
  values: Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  fraction: float,
  per_row: bool,
) -> Bool[Array, "B T"]:
  """Exactly max(1, floor(fraction m)) of m tokens, those of largest value.

  Of equal values the first in the row, then in the batch, are taken. The
  product is one of integers: no rounding drops a token of 0.29 x 100.

  Args:
    values: not NaN where `mask` is true, anything elsewhere; no gradient.
    mask: the tokens to choose from; of none, none is chosen.
    fraction: in (0, 1]; exact for up to four decimals.
    per_row: whether m counts the tokens of each row, or all of them.
  """
  axis = 1 if per_row else None
  total = jnp.sum(mask, axis=axis, dtype=jnp.int32, keepdims=True)
  count = jnp.minimum(jnp.maximum(_share(total, fraction)[0], 1), total)
  ordered = _ordered(values)
  last = _kth_largest(values, mask, count, axis)
  above = mask & (ordered > last)
  ties = mask & (ordered == last)
  turn = jnp.cumsum(ties, axis=1, dtype=jnp.int32)
  if not per_row:
    in_row = turn[:, -1:]
    turn = turn + jnp.cumsum(in_row, axis=0) - in_row
  left = count - jnp.sum(above, axis=axis, dtype=jnp.int32, keepdims=True)
  return above | (ties & (turn <= left))


def quantile(
  values: Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  fraction: float,
  per_row: bool,
) -> Float[Array, "#B 1"]:
  """The quantile with linear interpolation; of nothing, anything.

  With v_0 <= v_1 <= ... the n values and i + r = fraction (n - 1):
  (1 - r) v_i + r v_(i+1).

  Args:
    values: finite where `mask` is true, anything elsewhere; no gradient.
    mask: the tokens it is of.
    fraction: in [0, 1]; exact for up to four decimals.
    per_row: whether every row has its own, [B, 1], or all have one, [1, 1].
  """
  axis = 1 if per_row else None
  total = jnp.sum(mask, axis=axis, dtype=jnp.int32, keepdims=True)
  index, rest = _share(jnp.maximum(total - 1, 0), fraction)
  ordered = _ordered(values)
  found = _kth_largest(values, mask, total - index, axis)

  def smallest(chosen: Bool[Array, "B T"]) -> Float[Array, "#B 1"]:
    kept = jnp.where(chosen, values.astype(jnp.float32), jnp.inf)
    return jnp.min(kept, axis=axis, keepdims=True)

  lower = smallest(mask & (ordered >= found))
  up_to = jnp.sum(
    mask & (ordered <= found), axis=axis, dtype=jnp.int32, keepdims=True
  )
  following = smallest(mask & (ordered > found))
  upper = jnp.where((up_to > index + 1) | (rest == 0), lower, following)
  return lower + rest * (upper - lower)


def rational(fraction: float) -> Fraction:
  """The fraction of small integers that a float of four decimals stands for."""
  return Fraction(fraction).limit_denominator(10_000)


def _share(
  total: Int[Array, "..."], fraction: float
) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
  """Floor and rest of total x fraction, the product without rounding."""
  part = rational(fraction)
  whole, rest = jnp.divmod(total, part.denominator)
  more, rest = jnp.divmod(part.numerator * rest, part.denominator)
  return part.numerator * whole + more, rest / part.denominator


def _ordered(values: Float[Array, "B T"]) -> UInt32[Array, "B T"]:
  """The order of float32 values as that of unsigned integers."""
  values = jnp.where(values == 0, 0.0, values.astype(jnp.float32))  # No -0.0.
  bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _kth_largest(
  values: Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  count: Int[Array, "#B 1"],
  axis: int | None = None,
) -> UInt32[Array, "#B 1"]:
  """The `count`-th largest as `_ordered` has it, found bit by bit.

  Of each row for axis 1, with a count of its own; of the batch for None.
  """
  ordered = _ordered(values)

  def step(index: Int[Array, ""], found: UInt32[Array, "#B 1"]) -> Array:
    shift = jnp.uint32(31) - index.astype(jnp.uint32)
    tried = found | (jnp.uint32(1) << shift)
    above = jnp.sum(
      mask & (ordered >= tried), axis=axis, dtype=jnp.int32, keepdims=True
    )
    return jnp.where(above >= count, tried, found)

  return jax.lax.fori_loop(0, 32, step, jnp.zeros(count.shape, jnp.uint32))
