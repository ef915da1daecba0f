"""Temperature, top-k, top-p and min-p: logits in, filtered logits out.

A removed column is -inf, so softmax of the result is the renormalised
distribution. Nothing is sorted: top-k and top-p search their threshold by
bisection over the float32 numbers, 32 masked sums that a vocabulary spread over
devices turns into all-reduces of one number per row. Equal logits share their
fate, so columns tied with the last one kept are kept too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opd_jax.config import SamplingConfig


def apply(
  logits: Float[Array, "B V"], config: SamplingConfig
) -> Float[Array, "B V"]:
  """Temperature, then top-k, top-p and min-p, those that are set.

  The order is that of `transformers`; each filter sees the distribution the
  one before left.

  Args:
    logits: float32, -inf in columns that may not be drawn.
    config: `temperature` > 0.
  """
  logits = logits / config.temperature
  if config.top_k is not None:
    logits = top_k(logits, config.top_k)
  if config.top_p is not None:
    logits = top_p(logits, config.top_p)
  if config.min_p is not None:
    logits = min_p(logits, config.min_p)
  return logits


def top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
  """Keeps the k largest logits and those equal to the k-th."""
  counts = jnp.ones_like(logits)
  target = jnp.full(logits.shape[0], k, jnp.float32)
  return _keep(logits, logits >= _cutoff(logits, counts, target)[:, None])


def top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
  """Keeps the likeliest columns until their mass reaches p.

  Column i stays if the columns likelier than it have a mass below p; the
  likeliest one always stays.

  Differs from `transformers`: there, of several columns tied at the threshold
  only as many stay as the mass needs, which ones being up to the sort.
  """
  if p == 1:
    return logits
  weights = _weights(logits)
  target = p * jnp.sum(weights, axis=1)
  return _keep(logits, logits >= _cutoff(logits, weights, target)[:, None])


def min_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
  """Keeps columns at least p times as likely as the likeliest."""
  return _keep(logits, _weights(logits) >= p)


def _keep(logits: Float[Array, "B V"], kept: Array) -> Float[Array, "B V"]:
  return jnp.where(kept, logits, -jnp.inf)


def _weights(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
  """Probabilities relative to the likeliest column's."""
  return jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))


def _cutoff(
  logits: Float[Array, "B V"],
  weights: Float[Array, "B V"],
  target: Float[Array, " B"],
) -> Float[Array, " B"]:
  """The largest x with sum(weights[logits >= x]) >= target; -inf if none.

  Bisects over the integers that order like float32 numbers, so the result is
  exact after one step per bit.
  """

  def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bounds
    middle = (low & high) + ((low ^ high) >> 1)
    kept = logits >= _float(middle)[:, None]
    reached = jnp.sum(jnp.where(kept, weights, 0.0), axis=1) >= target
    return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

  highest = _ordinal(jnp.max(logits, axis=1)) + 1
  lowest = jnp.broadcast_to(_ordinal(jnp.float32(-jnp.inf)), highest.shape)
  low, _ = jax.lax.fori_loop(0, 32, halve, (lowest, highest))
  return _float(low)


def _ordinal(x: Float[Array, "*S"]) -> Int[Array, "*S"]:
  """An int32 per float32, in the same order."""
  return _flip(jax.lax.bitcast_convert_type(x, jnp.int32))


def _float(ordinal: Int[Array, "*S"]) -> Float[Array, "*S"]:
  """The inverse of `_ordinal`."""
  return jax.lax.bitcast_convert_type(_flip(ordinal), jnp.float32)


def _flip(bits: Int[Array, "*S"]) -> Int[Array, "*S"]:
  """Reverses the order of the negative numbers; its own inverse."""
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
