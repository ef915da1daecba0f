"""Completions that begin with given tokens, or consist of them.

Which rows get how many is decided on the device, from a key and the place of
the step in the run, so that nothing is compiled again as it changes.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax import sequences
from opd_jax.config import RolloutConfig, SamplingConfig
from opd_jax.sampling.sampler import Cache, Decoder, sample
from opd_jax.types import (
  STOP_ID,
  STOP_LENGTH,
  Params,
  PromptBatch,
  Rollout,
)

CacheT = TypeVar("CacheT", bound=Cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
  """What is given of each completion.

  Attributes:
    tokens: ids; only the first `lengths` of a row are used.
    lengths: given ids, 0 for none.
    complete: nothing is drawn behind them.
  """

  tokens: Int[Array, "B T"]
  lengths: Int[Array, " B"]
  complete: Bool[Array, " B"]


def choose(
  config: RolloutConfig,
  stored: PromptBatch,
  progress: Float[Array, ""],
  key: Key[Array, ""],
  stop_ids: tuple[int, ...],
) -> Given:
  """How much of its stored completion each row is given.

  A row is given the whole of it with probability `stored_fraction`, and else
  its beginning, see `prefix_limit`. A row without one is given nothing. One
  that is given a stop id is complete.

  Args:
    config: of the rollout.
    stored: a completion per row.
    progress: step / steps of the run, in [0, 1).
    key: of this step and purpose.
    stop_ids: end a completion.
  """
  rows, length = stored.tokens.shape
  for_rows, for_prefix = jax.random.split(key)
  scope = (rows,) if config.stored_scope == "row" else ()
  uniform = jax.random.uniform(for_rows, scope)
  whole = (uniform < config.stored_fraction) & (stored.lengths > 0)
  lengths = jnp.zeros_like(stored.lengths)
  if config.prefix == "cosine":
    limit = jnp.round(prefix_limit(length, progress)).astype(jnp.int32)
    lengths = jnp.minimum(limit, stored.lengths)
    if config.prefix_draw == "uniform":
      uniform = jax.random.uniform(for_prefix, (rows,))
      lengths = jnp.floor(uniform * (lengths + 1)).astype(jnp.int32)
  lengths = jnp.where(whole, stored.lengths, lengths)
  stops = ends_in_stop(stored.tokens, lengths, stop_ids)
  return Given(tokens=stored.tokens, lengths=lengths, complete=whole | stops)


def prefix_limit(length: int, progress: Float[Array, ""]) -> Float[Array, ""]:
  """Most tokens of a prefix: L (1 + cos(pi s / S)) / 2 of L at s of S steps.

  Source: arXiv 2606.01249, Sec. 4.3, which names a cosine from the full length
  to 0 without writing it.
  """
  return 0.5 * length * (1 + jnp.cos(jnp.pi * progress))


def ends_in_stop(
  tokens: Int[Array, "B T"],
  lengths: Int[Array, " B"],
  stop_ids: tuple[int, ...],
) -> Bool[Array, " B"]:
  """Whether the last of the first `lengths` ids of a row is a stop id."""
  last = jnp.maximum(lengths - 1, 0)[:, None]
  last = jnp.take_along_axis(tokens, last, axis=1)[:, 0]
  return (lengths > 0) & jnp.isin(last, jnp.array(stop_ids, jnp.int32))


def complete(
  decoder: Decoder[CacheT],
  params: Params,
  prompts: PromptBatch,
  given: Given,
  *,
  config: SamplingConfig,
  stop_ids: tuple[int, ...],
  rollouts: int,
  key: Key[Array, ""],
  vocab_size: int,
  prefixes: bool,
) -> Rollout:
  """Draws what is not given of `rollouts` completions of each prompt.

  The student reads prompt and prefix as one longer prompt; the token at index t
  of a completion is drawn with the uniform of t, whatever is given. Where
  nothing is given, tokens are those of `sample`.

  Args:
    decoder: the model.
    params: its weights, in the layout to decode in.
    prompts: at least one id each.
    given: per completion, B = prompts x `rollouts`.
    config: see `sample`, as for all that is not named here.
    stop_ids: see there.
    rollouts: see there.
    key: see there.
    vocab_size: see there.
    prefixes: whether a row that is not complete may be given tokens; without,
      the rollouts of a prompt share its prefill, which is no longer than usual.
  """
  length = config.max_new_tokens
  rows = given.lengths.shape[0]
  repeated = jax.tree.map(lambda x: jnp.repeat(x, rollouts, axis=0), prompts)
  starts = jnp.where(given.complete, length, given.lengths)
  drawn = sample(
    decoder,
    params,
    sequences.extend(repeated, given.tokens, given.lengths)
    if prefixes
    else prompts,
    config=config,
    stop_ids=stop_ids,
    rollouts=1 if prefixes else rollouts,
    key=key,
    vocab_size=vocab_size,
    rows=jnp.arange(rows),
    starts=starts,
  )
  index = jnp.arange(length)[None, :]
  before = given.lengths[:, None]
  source = jnp.maximum(index - before, 0)

  def behind(values: Array) -> Array:
    """Moves what was drawn behind what is given."""
    return jnp.take_along_axis(values, source, axis=1)

  is_given = index < before
  mask = ~is_given & behind(drawn.sampled_mask)
  lengths = given.lengths + drawn.lengths
  tokens = jnp.where(
    is_given, given.tokens, jnp.where(mask, behind(drawn.tokens), 0)
  )
  return Rollout(
    prompts=repeated,
    tokens=tokens,
    lengths=lengths,
    sampled_mask=mask,
    behavior_logprobs=jnp.where(mask, behind(drawn.behavior_logprobs), 0.0),
    stop_reason=jnp.where(
      ends_in_stop(tokens, lengths, stop_ids), STOP_ID, STOP_LENGTH
    ),
  )
