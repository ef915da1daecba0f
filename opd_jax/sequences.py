"""Prompt and completion as one row: the only place that knows the layout.

A joined row holds the prompt right-aligned in P slots, then the completion in T
slots, so the boundary sits in the same slot for every row. Positions count from
the prompt's first id; -1 marks an empty slot, and position alone decides what
attention may see.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from opd_jax.types import PromptBatch


def right_align(
  prompts: PromptBatch,
) -> tuple[Int[Array, "B P"], Int[Array, "B P"]]:
  """Moves left-aligned prompts to the right end of their slots.

  Returns:
    Tokens, and positions 0, 1, ... with -1 in the empty slots before them.
  """
  slots = prompts.tokens.shape[1]
  offset = (slots - prompts.lengths)[:, None]
  positions = jnp.arange(slots, dtype=jnp.int32)[None, :] - offset
  source = jnp.clip(positions, 0, slots - 1)
  tokens = jnp.take_along_axis(prompts.tokens, source, axis=1)
  empty = positions < 0
  return jnp.where(empty, 0, tokens), jnp.where(empty, -1, positions)


def extend(
  prompts: PromptBatch, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> PromptBatch:
  """Prompts of P + T slots that go on with the first `lengths` tokens."""
  slots = prompts.tokens.shape[1]
  width = slots + tokens.shape[1]
  index = jnp.arange(width, dtype=jnp.int32)[None, :]
  behind = index - prompts.lengths[:, None]
  both = jnp.concatenate([prompts.tokens, tokens], axis=1)
  source = jnp.where(behind < 0, index, jnp.minimum(slots + behind, width - 1))
  joined = jnp.take_along_axis(both, source, axis=1)
  return PromptBatch(
    tokens=jnp.where(behind < lengths[:, None], joined, 0),
    lengths=prompts.lengths + lengths,
  )


def join(
  prompts: PromptBatch, completion: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
  """Joins prompts with completions of `lengths` tokens; see the module."""
  tokens, positions = right_align(prompts)
  index = jnp.arange(completion.shape[1], dtype=jnp.int32)[None, :]
  completion_positions = jnp.where(
    index < lengths[:, None], prompts.lengths[:, None] + index, -1
  )
  return (
    jnp.concatenate([tokens, completion], axis=1),
    jnp.concatenate([positions, completion_positions], axis=1),
  )
