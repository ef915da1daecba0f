"""One token per row from logits and one uniform per row.

Inverse CDF on two levels: the vocabulary is cut into `BLOCKS` runs of columns;
the uniform picks a run by the runs' masses, what is left of it picks a column
inside the run. One pass takes the maximum, one the masses, and nothing of size
V is written, sorted or drawn: at [8, 32000] on a CPU ten times faster than
`jax.random.categorical`, which draws a Gumbel variable per column.

A vocabulary padded to a multiple of `BLOCKS` and spread over a power of two of
devices keeps every run on one device: only [B, BLOCKS] masses and the chosen
run travel, and sums are taken in the same order as on a single device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

BLOCKS = 128


def uniforms(
  key: Key[Array, ""], rows: Int[Array, " B"], length: int
) -> Float[Array, "B T"]:
  """Uniforms in [0, 1), entry [b, t] being a function of (key, rows[b], t).

  So a row's tokens do not depend on its batch mates, padding or device.
  """

  def one(row: Array, index: Array) -> Array:
    return jax.random.uniform(
      jax.random.fold_in(jax.random.fold_in(key, row), index)
    )

  along_row = jax.vmap(one, in_axes=(None, 0))
  return jax.vmap(along_row, in_axes=(0, None))(rows, jnp.arange(length))


def draw(
  logits: Float[Array, "B V"], uniform: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """Token i with probability p_i = softmax(logits)_i.

  The token is the first i with p_0 + ... + p_i > uniform. It always has
  p_i > 0 in float32, whatever the rounding of the sums, if any column has.
  `uniform` has 2^23 values, so probabilities are met to about 1e-7 each.

  Args:
    logits: float32; -inf removes a column.
    uniform: in [0, 1).

  Returns:
    Tokens, and log p of them in nats.
  """
  batch, columns = logits.shape
  padding = -columns % BLOCKS
  if padding:
    logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
  blocks = logits.reshape(batch, BLOCKS, -1)
  peak = jnp.max(blocks, axis=(1, 2))
  masses = jnp.sum(jnp.exp(blocks - peak[:, None, None]), axis=2)
  cumulative = jnp.cumsum(masses, axis=1)
  total = jnp.max(cumulative, axis=1)
  block, rest = _pick(masses, cumulative, uniform * total)
  chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  weights = jnp.exp(chosen - peak[:, None])
  column, _ = _pick(weights, jnp.cumsum(weights, axis=1), rest)
  logit = jnp.take_along_axis(chosen, column[:, None], axis=1)[:, 0]
  return block * blocks.shape[2] + column, logit - peak - jnp.log(total)


def greedy(
  logits: Float[Array, "B V"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """The likeliest token, the lowest id on ties, and its log softmax in nats."""
  tokens = jnp.argmax(logits, axis=1).astype(jnp.int32)
  logit = jnp.max(logits, axis=1)
  return tokens, logit - jax.nn.logsumexp(logits, axis=1)


def _pick(
  weights: Float[Array, "B N"],
  cumulative: Float[Array, "B N"],
  target: Float[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """The first positive weight whose cumulative sum exceeds the target.

  Rounded sums may be non-monotone or end below the target: a weight of zero
  is never chosen, and the last positive one is where nothing exceeds it.

  Returns:
    Index, and the target less the sums before it.
  """
  size = weights.shape[1]
  index = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
  positive = weights > 0
  above = cumulative > target[:, None]
  first = jnp.min(jnp.where(positive & above, index, size), axis=1)
  last = jnp.max(jnp.where(positive, index, 0), axis=1)
  before = jnp.max(jnp.where(above, 0.0, cumulative), axis=1)
  return jnp.minimum(first, last), target - before
