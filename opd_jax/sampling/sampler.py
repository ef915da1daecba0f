"""Completions for prompts, drawn from a decoder in one `lax.while_loop`.

Prompts are right-aligned and prefilled once each; their cache is then copied to
the G rollouts. Every row writes slot P + s at step s, whatever its prompt's
length; a row that has ended writes position -1, which attention never sees. The
loop ends when every row has.
"""

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax import sequences
from opd_jax.config import SamplingConfig
from opd_jax.errors import InputError
from opd_jax.sampling import draw, filters
from opd_jax.types import (
  STOP_ID,
  STOP_LENGTH,
  Params,
  PromptBatch,
  Rollout,
)

CacheT = TypeVar("CacheT", bound="Cache")


@runtime_checkable
class Cache(Protocol):
  """What a decoder remembers of the tokens so far; a pytree."""

  def repeat(self: CacheT, n: int) -> CacheT:
    """Every row n times, row b becoming rows b * n ... b * n + n - 1."""
    ...


@runtime_checkable
class Decoder(Protocol[CacheT]):
  """The three functions of a model that sampling calls.

  Hidden states are arrays [B, ...], or pytrees of them.
  """

  def prefill(
    self,
    params: Params,
    tokens: Int[Array, "B P"],
    positions: Int[Array, "B P"],
    slots: int,
  ) -> tuple[Any, CacheT]:
    """Last hidden state of right-aligned prompts, and a cache of `slots`."""
    ...

  def decode(
    self,
    params: Params,
    cache: CacheT,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    slot: Int[Array, ""],
  ) -> tuple[Any, CacheT]:
    """Hidden state of one more token per row, written at `slot`."""
    ...

  def logits(self, params: Params, hidden: Any) -> Float[Array, "*B V"]:
    """float32 logits of the next token."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
  """The loop's carry.

  Attributes:
    step: s, the tokens drawn by a row that has not ended.
    last: the token drawn at s - 1.
    stopped: the row has drawn a stop id.
    ended: it has, or it has drawn as many tokens as it may.
    lengths: tokens drawn by the row.
    tokens: completions, 0 in slots not drawn.
    logprobs: nats, 0 in slots not drawn.
    cache: of everything before `last`.
  """

  step: Int[Array, ""]
  last: Int[Array, " B"]
  stopped: Bool[Array, " B"]
  ended: Bool[Array, " B"]
  lengths: Int[Array, " B"]
  tokens: Int[Array, "B T"]
  logprobs: Float[Array, "B T"]
  cache: Any


def sample(
  decoder: Decoder[CacheT],
  params: Params,
  prompts: PromptBatch,
  *,
  config: SamplingConfig,
  stop_ids: tuple[int, ...],
  rollouts: int,
  key: Key[Array, ""],
  vocab_size: int,
  rows: Int[Array, " B"] | None = None,
  starts: Int[Array, " B"] | None = None,
) -> Rollout:
  """Draws `rollouts` completions of each prompt; pure, for use inside jit.

  The behavior distribution is softmax(logits / temperature) over the first
  `vocab_size` columns, filtered by top-k, top-p and min-p in this order and
  renormalised; `behavior_logprobs` are taken from it. At temperature 0 the
  likeliest token is taken (the lowest id on ties), filters do nothing, and
  `behavior_logprobs` are those of the softmax at temperature 1, not the 0 of a
  point mass.

  The token of row b at index t depends on the prompt, `key`, `rows[b]` and
  starts[b] + t only.

  Args:
    decoder: the model.
    params: its weights, in the layout to decode in.
    prompts: at least one id each.
    config: `max_new_tokens`, temperature and filters; its `stop_ids` are not
      read, since those of a tokenizer may stand in for them.
    stop_ids: end a completion and belong to it; () never stops early.
    rollouts: G, completions per prompt.
    key: of this step.
    vocab_size: columns from here on are never drawn.
    rows: a number per completion that names its randomness; by default its
      place b * G + g.
    starts: tokens of each completion that its prompt ends with: so many fewer
      are drawn, none from `max_new_tokens` on; None for 0.

  Raises:
    InputError: `vocab_size` exceeds the decoder's columns, `top_k` or a stop
      id exceeds `vocab_size`, or `rollouts` < 1.
  """
  check(config, stop_ids, rollouts, vocab_size)
  length = config.max_new_tokens
  tokens, positions = sequences.right_align(prompts)
  width = tokens.shape[1]
  hidden, cache = decoder.prefill(params, tokens, positions, width + length)
  hidden, prompts = jax.tree.map(
    lambda x: jnp.repeat(x, rollouts, axis=0), (hidden, prompts)
  )
  batch = prompts.lengths.shape[0]
  if rows is None:
    rows = jnp.arange(batch)
  uniforms = draw.uniforms(key, rows, length)
  limits = jnp.full(batch, length, jnp.int32)
  if starts is not None:
    index = jnp.minimum(starts[:, None] + jnp.arange(length), length - 1)
    uniforms = jnp.take_along_axis(uniforms, index, axis=1)
    limits = limits - starts

  def record(state: _State, hidden: Any) -> _State:
    """Draws the token at `state.step`."""
    logits = _mask(decoder.logits(params, hidden), vocab_size)
    if config.temperature == 0:
      token, logprob = draw.greedy(logits)
    else:
      uniform = jax.lax.dynamic_index_in_dim(
        uniforms, state.step, axis=1, keepdims=False
      )
      token, logprob = draw.draw(filters.apply(logits, config), uniform)
    live = ~state.ended
    token = jnp.where(live, token, 0)
    logprob = jnp.where(live, logprob, 0.0)
    stop = live & jnp.isin(token, jnp.array(stop_ids, jnp.int32))
    return _State(
      step=state.step + 1,
      last=token,
      stopped=state.stopped | stop,
      ended=state.ended | stop | (state.step + 1 >= limits),
      lengths=state.lengths + live.astype(jnp.int32),
      tokens=_write(state.tokens, token, state.step),
      logprobs=_write(state.logprobs, logprob, state.step),
      cache=state.cache,
    )

  def unfinished(state: _State) -> Array:
    # Rows end by the bound; it is here for readers of the compiled loop.
    return (state.step < length) & ~jnp.all(state.ended)

  def advance(state: _State) -> _State:
    position = prompts.lengths + state.step - 1
    hidden, cache = decoder.decode(
      params,
      state.cache,
      state.last,
      jnp.where(state.ended, -1, position),
      width + state.step - 1,
    )
    return record(dataclasses.replace(state, cache=cache), hidden)

  start = _State(
    step=jnp.int32(0),
    last=jnp.zeros(batch, jnp.int32),
    stopped=jnp.zeros(batch, bool),
    ended=limits <= 0,
    lengths=jnp.zeros(batch, jnp.int32),
    tokens=jnp.zeros((batch, length), jnp.int32),
    logprobs=jnp.zeros((batch, length), jnp.float32),
    cache=cache.repeat(rollouts),
  )
  first = record(start, hidden)
  with jax.named_scope("decode_loop"):
    state = jax.lax.while_loop(unfinished, advance, first)
  return Rollout(
    prompts=prompts,
    tokens=state.tokens,
    lengths=state.lengths,
    sampled_mask=jnp.arange(length)[None, :] < state.lengths[:, None],
    behavior_logprobs=state.logprobs,
    stop_reason=jnp.where(state.stopped, STOP_ID, STOP_LENGTH),
  )


def check(
  config: SamplingConfig,
  stop_ids: tuple[int, ...],
  rollouts: int,
  vocab_size: int,
) -> None:
  """Refuses what `sample` cannot draw; needs no model.

  Args:
    config: how to draw.
    stop_ids: end a completion.
    rollouts: G, completions per prompt.
    vocab_size: V, ids that may be drawn.

  Raises:
    InputError: `top_k` or a stop id exceeds `vocab_size`, or `rollouts` < 1.
  """
  if config.top_k is not None and config.top_k > vocab_size:
    raise InputError(
      f"sampling.top_k must be in [1, V={vocab_size}], got {config.top_k}; "
      "use None for all"
    )
  for stop_id in stop_ids:
    if not 0 <= stop_id < vocab_size:
      raise InputError(
        f"stop id {stop_id} can never be drawn: ids are in [0, "
        f"V={vocab_size}); name the student's own end ids in sampling.stop_ids"
      )
  if rollouts < 1:
    raise InputError(f"rollouts per prompt must be >= 1, got {rollouts}")


def _mask(logits: Float[Array, "B V"], vocab_size: int) -> Float[Array, "B V"]:
  """-inf in the columns from `vocab_size` on."""
  columns = logits.shape[1]
  if vocab_size > columns:
    raise InputError(
      f"vocab_size must be at most the decoder's {columns} columns, got "
      f"{vocab_size}"
    )
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  return jnp.where(index < vocab_size, logits, -jnp.inf)


def _write(buffer: Array, column: Array, index: Int[Array, ""]) -> Array:
  """Sets column `index` of a [B, T] buffer."""
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, column[:, None], index, axis=1
  )
