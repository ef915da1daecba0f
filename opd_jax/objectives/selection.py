"""Tokens chosen by their rank in the whole batch.

For `prepare`, which sees the global batch. Everything here is a sum over
tokens, so that it is the same however the batch is spread over devices, and
needs no sort and no copy of the batch on each of them.
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
  total = jnp.sum(mask, dtype=jnp.int32)
  part = Fraction(fraction).limit_denominator(10_000)
  whole, rest = jnp.divmod(jnp.maximum(total - 1, 0), part.denominator)
  count = 1 + part.numerator * whole + part.numerator * rest // part.denominator
  return mask & (_ordered(values) >= _kth_largest(values, mask, count))


def _ordered(values: Float[Array, "B T"]) -> UInt32[Array, "B T"]:
  """The order of float32 values as that of unsigned integers."""
  values = jnp.where(values == 0, 0.0, values.astype(jnp.float32))  # No -0.0.
  bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _kth_largest(
  values: Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  count: Int[Array, ""],
) -> UInt32[Array, ""]:
  """The `count`-th largest as `_ordered` has it, found bit by bit."""
  ordered = _ordered(values)

  def step(index: Int[Array, ""], found: UInt32[Array, ""]) -> Array:
    shift = jnp.uint32(31) - index.astype(jnp.uint32)
    tried = found | (jnp.uint32(1) << shift)
    above = jnp.sum(mask & (ordered >= tried), dtype=jnp.int32)
    return jnp.where(above >= count, tried, found)

  return jax.lax.fori_loop(0, 32, step, jnp.uint32(0))
