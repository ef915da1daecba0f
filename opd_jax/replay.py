"""The replay of DistiLLM: old completions of the student, trained on again.

Each step is one of three, by one uniform r and a threshold h in [0, 1], of s
steps done of S:

  r < h (1 - s / S), or r < h and the buffer not full   drawn, and kept
  r < h else                                            replayed
  r >= h                                                stored completions

The buffer holds the last `capacity` completions drawn; a replayed batch is
chosen from it without repetition. h grows when the held-out loss does.

Source: Ko et al., arXiv 2402.03898, in the order of the official code.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from opd_jax.config import RolloutConfig, RunConfig
from opd_jax.types import PromptBatch, Rollout

State = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """Where the completions of a step come from; stored ones if neither holds.

  Attributes:
    fresh: they are drawn.
    replayed: they are taken from the buffer.
  """

  fresh: Bool[Array, ""]
  replayed: Bool[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
  """The first-in, first-out buffer; its arrays are in the train state.

  Attributes:
    capacity: completions.
    window: P, slots of a prompt.
    length: T, slots of a completion.
  """

  capacity: int
  window: int
  length: int

  @classmethod
  def of(cls, config: RunConfig) -> "Buffer | None":
    """The buffer of a run; None if it has none."""
    if config.rollout.replay_capacity is None:
      return None
    return cls(
      capacity=config.rollout.replay_capacity,
      window=config.data.max_prompt_tokens,
      length=config.sampling.max_new_tokens,
    )

  def empty(self) -> dict[str, Array]:
    """The arrays before the first step."""
    return {
      "prompts": jnp.zeros((self.capacity, self.window), jnp.int32),
      "prompt_lengths": jnp.zeros(self.capacity, jnp.int32),
      "tokens": jnp.zeros((self.capacity, self.length), jnp.int32),
      "lengths": jnp.zeros(self.capacity, jnp.int32),
      "stop_reason": jnp.zeros(self.capacity, jnp.int32),
      "next": jnp.zeros((), jnp.int32),
      "filled": jnp.zeros((), jnp.int32),
    }

  def source(
    self,
    state: State,
    threshold: Float[Array, ""],
    progress: Float[Array, ""],
    key: Key[Array, ""],
  ) -> Source:
    """What a step trains on; see the module."""
    uniform = jax.random.uniform(key)
    below = uniform < threshold
    early = uniform < threshold * (1 - progress)
    fresh = early | (below & (state["filled"] < self.capacity))
    return Source(fresh=fresh, replayed=below & ~fresh)

  def pull(self, state: State, rows: int, key: Key[Array, ""]) -> Rollout:
    """Completions of a full buffer, nothing of them drawn now."""
    chosen = jax.random.permutation(key, self.capacity)[:rows]
    prompts = PromptBatch(
      tokens=state["prompts"][chosen], lengths=state["prompt_lengths"][chosen]
    )
    return Rollout(
      prompts=prompts,
      tokens=state["tokens"][chosen],
      lengths=state["lengths"][chosen],
      sampled_mask=jnp.zeros((rows, self.length), bool),
      behavior_logprobs=jnp.zeros((rows, self.length), jnp.float32),
      stop_reason=state["stop_reason"][chosen],
    )

  def push(
    self, state: State, rollout: Rollout, fresh: Bool[Array, ""]
  ) -> dict[str, Array]:
    """The arrays with the completions of a step, if they were drawn."""
    rows = rollout.lengths.shape[0]
    slots = (state["next"] + jnp.arange(rows)) % self.capacity
    new = {
      "prompts": rollout.prompts.tokens,
      "prompt_lengths": rollout.prompts.lengths,
      "tokens": rollout.tokens,
      "lengths": rollout.lengths,
      "stop_reason": rollout.stop_reason,
    }
    pushed = {name: state[name].at[slots].set(new[name]) for name in new}
    pushed["next"] = (state["next"] + rows) % self.capacity
    pushed["filled"] = jnp.minimum(state["filled"] + rows, self.capacity)
    return {
      name: jnp.where(fresh, pushed[name], state[name]) for name in pushed
    }


class Threshold:
  """h, which follows the held-out loss on the host.

  Attributes:
    value: in [0, 1].
  """

  def __init__(self, config: RolloutConfig):
    """As it is before the first measurement."""
    self._config = config
    self._reference = math.inf
    self.value = config.replay_threshold

  def observe(self, loss: float) -> None:
    """Gains if the loss has risen far enough above its reference.

    The reference is the first loss, and after a gain the loss at that gain.

    Args:
      loss: held-out, nats per token.
    """
    config = self._config
    if self._reference == math.inf:
      self._reference = loss
    elif loss >= self._reference + config.replay_rise:
      self._reference = loss
      self.value = min(1.0, self.value + config.replay_raise)

  def get_state(self) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON."""
    known = self._reference < math.inf
    reference = self._reference if known else None
    return {"value": self.value, "reference": reference}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from what `get_state` gave."""
    self.value = state["value"]
    reference = state["reference"]
    self._reference = math.inf if reference is None else reference
