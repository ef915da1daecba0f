"""The arrays that travel between the stages of a step.

Letters: B sequences (prompts x G rollouts each), P prompt slots, T completion
slots, S = P + T, C a chunk of T, V vocabulary columns. Index t of every
`[B, T]` array is about completion token t. Masks come from lengths, never from
token ids, so a pad id may equal an end-of-sequence id. Every class is a frozen
pytree.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

# A nested dict of arrays.
Params = Mapping[str, Any]

# The value of a field that was not asked for. It is `None`, but the fields are
# typed as arrays: whoever declared the need may read them.
ABSENT: Any = None

# Why a rollout ended: values of `Rollout.stop_reason`.
STOP_LENGTH = 0  # Ran into the completion limit: truncated.
STOP_ID = 1  # Drew one of the stop ids, which is part of the completion.

# Log-probability of a vocabulary column no model may use. It is finite, so
# that p * (log p - log q) is exactly 0 there, and exp(MASKED_LOGPROB) == 0.
MASKED_LOGPROB = -1e4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
  """Prompts of one step, left-aligned: row b holds `lengths[b]` ids, then 0."""

  tokens: Int[Array, "B P"]
  lengths: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInputs:
  """What the host hands to a step.

  Attributes:
    prompts: the student's.
    privileged: second prompts with what only a teacher should know.
    teacher_prompts: what the teacher reads in front of the same completions;
      None gives it the student's prompts.
    given: stored completions of the prompts, of 0 ids where there is none;
      None if this run has none at all.
    replay_threshold: of the step, in [0, 1]; None without a replay buffer.
    sources: index of each prompt's data source; None where nobody asks.
  """

  prompts: PromptBatch
  privileged: PromptBatch | None = None
  teacher_prompts: PromptBatch | None = None
  given: PromptBatch | None = None
  replay_threshold: Float[Array, ""] | None = None
  sources: Int[Array, " P"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
  """Completions of prompts, row b * G + g being rollout g of prompt b.

  Attributes:
    prompts: the prompt of every row (repeated G times, so B rows).
    tokens: completion ids, 0 behind the end.
    lengths: tokens of each, given ones and the stop id included.
    sampled_mask: true for drawn tokens, the stop id included; given tokens are
      within the length and not drawn.
    behavior_logprobs: nats, under the sampling distribution (temperature and
      filters applied, renormalised); 0 where nothing was drawn.
    stop_reason: `STOP_LENGTH` or `STOP_ID`.
    rewards: of the host stage's verifier, in [0, 1]; None before it, and where
      there is none.
  """

  prompts: PromptBatch
  tokens: Int[Array, "B T"]
  lengths: Int[Array, " B"]
  sampled_mask: Bool[Array, "B T"]
  behavior_logprobs: Float[Array, "B T"]
  stop_reason: Int[Array, " B"]
  rewards: Float[Array, " B"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
  """Where the examples of packed rows lie; a slot sees its own example only.

  Attributes:
    positions: 0, 1, ... from the first id of each example; -1 in empty slots.
    segments: which example of its row a slot belongs to.
  """

  positions: Int[Array, "B S"]
  segments: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRows:
  """Examples packed whole into rows, which do not see each other.

  Attributes:
    tokens: ids; 0 in empty slots.
    packing: where the examples lie.
    learned: ids that carry loss; never the first of an example, which nothing
      predicts.
  """

  tokens: Int[Array, "B S"]
  packing: Packing
  learned: Bool[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringBatch:
  """Rows to be scored.

  Attributes:
    prompts: the plain prompt of every row.
    privileged: the second prompt, with what only a teacher should know.
    teacher_prompts: the teacher's prompt of every row; None for the plain one.
    tokens: completion ids, the same after any of these prompts.
    lengths: completion tokens per row; models see no more than these.
    sampled_mask: drawn by the student, stop id included.
    loss_mask: carries loss; true within the first `lengths` tokens only.
    behavior_valid: `behavior_logprobs` exists for this token.
    behavior_logprobs: nats, under the distribution that drew the token.
    group: the prompt's index in the global batch.
    start_logprobs: nats, of the student before the first of several updates on
      these rows; None where this is the first.
    rewards: of the host stage; None where there is none.
    sources: index of each row's data source; None where nobody asks.
    packing: of rows that hold several examples each: then prompt and
      completion are one run of slots, cut behind the first; None for rows of
      one prompt and one completion.
  """

  prompts: PromptBatch
  privileged: PromptBatch | None = None
  teacher_prompts: PromptBatch | None = None
  tokens: Int[Array, "B T"]
  lengths: Int[Array, " B"]
  sampled_mask: Bool[Array, "B T"]
  loss_mask: Bool[Array, "B T"]
  behavior_valid: Bool[Array, "B T"]
  behavior_logprobs: Float[Array, "B T"]
  group: Int[Array, " B"]
  start_logprobs: Float[Array, "B T"] | None = None
  rewards: Float[Array, " B"] | None = None
  sources: Int[Array, " B"] | None = None
  packing: Packing | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelScores:
  """What one model says of the completion, float32, at the run's temperature.

  Attributes:
    logprobs: nats of the completion token; 0 where `loss_mask` is false.
    entropy: nats of the next-token distribution; 0 where masked. Carries no
      gradient unless the request says `entropy_gradient`.
    vocab_logprobs: the whole next-token distribution. Columns beyond the
      vocabulary shared by all models hold `MASKED_LOGPROB`.
  """

  logprobs: Float[Array, "B T"] = ABSENT
  entropy: Float[Array, "B T"] = ABSENT
  vocab_logprobs: Float[Array, "B T V"] = ABSENT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """Everything an objective may read; exactly the fields it declared are set.

  Attributes:
    tokens: completion ids.
    sampled_mask: drawn by the student, stop id included.
    loss_mask: carries loss (a forced prefix may, a tool's output must not).
    behavior_valid: `behavior_logprobs` exists for this token.
    behavior_logprobs: nats, under the distribution that drew the token.
    group: the prompt's index in the global batch; rows of a group are
      rollouts of one prompt.
    rewards: of each completion, in [0, 1], by the run's verifier.
    student: the student after the plain prompt.
    student_privileged: the student after the second, privileged prompt.
    teacher: the frozen teacher; of several, that of the row's source.
    reference: the frozen reference.
    start_logprobs: nats of the completion token, of the student at the start
      of the step's updates, as it is scored: unlike the behavior, without
      filters and mixtures. Without gradient.
  """

  tokens: Int[Array, "B T"]
  sampled_mask: Bool[Array, "B T"]
  loss_mask: Bool[Array, "B T"]
  behavior_valid: Bool[Array, "B T"]
  behavior_logprobs: Float[Array, "B T"]
  group: Int[Array, " B"]
  rewards: Float[Array, " B"] = ABSENT
  student: ModelScores
  student_privileged: ModelScores
  teacher: ModelScores
  reference: ModelScores
  start_logprobs: Float[Array, "B T"] = ABSENT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """What a step changes, and a checkpoint holds.

  Attributes:
    step: steps done, each a rollout batch.
    params: float32 master weights of the student, or of its adapters alone.
    optimizer: state of the optax chain.
    objective: the objective's own arrays across steps; `{}` if it has none.
    replay: completions to be trained on again, see `replay`; `{}` if none are.
  """

  step: Int[Array, ""]
  params: Params
  optimizer: Any
  objective: Mapping[str, Array]
  replay: Mapping[str, Array] = dataclasses.field(default_factory=dict)
