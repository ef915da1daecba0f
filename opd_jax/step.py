"""One step of on-policy distillation, as one compiled program or as two.

  1. Reshard a compute-dtype copy of the student into the decode layout, once.
  2. Sample G completions per prompt.
  3. Score them: the student with gradient, teacher and reference without.
  4. `prepare` looks at the whole batch, `terms` at its parts; sum the gradient.
  5. Update.

`fused` is 1-5 in one program. `split` is 1-2 and 3-5 in two, for objectives
that need the host in between. They are made of the same functions and draw the
same tokens. Programs are compiled ahead of the first step and cannot recompile.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from opd_jax import sampling
from opd_jax.config import RolloutConfig, SamplingConfig
from opd_jax.models import Model
from opd_jax.replay import Source, State
from opd_jax.sampling import Given
from opd_jax.scoring import Observed
from opd_jax.types import (
  STOP_LENGTH,
  Params,
  PromptBatch,
  Rollout,
  ScoringBatch,
  StepInputs,
  TrainState,
)
from opd_jax.update import Frozen, Metrics, Update

# Folded into the key of a step for what is given; see `update` for the others.
_GIVEN = 2**31 - 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Update):
  """All that is static about a step; its methods are pure and jit-able.

  Attributes:
    decoder: the student in the decode layout.
    sampling: how completions are drawn.
    stop_ids: that end them.
    rollouts: G, completions per prompt.
    mixing: what of the completions is given.
  """

  decoder: Model
  sampling: SamplingConfig
  stop_ids: tuple[int, ...]
  rollouts: int
  mixing: RolloutConfig

  @jax.named_scope("rollout")
  def rollout(
    self,
    params: Params,
    frozen: Frozen,
    step: Int[Array, ""],
    inputs: StepInputs,
    replay: State | None = None,
  ) -> Rollout:
    """Draws the completions of a step; the key is (seed, step).

    Args:
      params: the student's.
      frozen: the other models', by role.
      step: updates done.
      inputs: of the step.
      replay: arrays of the replay buffer, where there is one.
    """
    prompts = self._rows(inputs.prompts)
    options = {
      "config": self.sampling,
      "stop_ids": self.stop_ids,
      "rollouts": self.rollouts,
      "key": self._key(step),
      "vocab_size": self.scorer.vocab_size,
    }
    copy = self.decoder.working_copy(params)
    if inputs.given is None:
      return sampling.sample(self.decoder, copy, prompts, **options)
    stored = jax.tree.map(
      lambda leaf: jnp.repeat(leaf, self.rollouts, axis=0),
      self._rows(inputs.given),
    )
    prefixes = self.mixing.prefix != "none"
    if self.replay is None or replay is None:
      given = sampling.choose(
        self.mixing,
        stored,
        self.schedule(step).progress,
        self._given_key(step),
        self.stop_ids,
      )
      return sampling.complete(
        self.decoder, copy, prompts, given, prefixes=prefixes, **options
      )
    source = self._source(replay, step, inputs)
    taken = ~source.fresh & (stored.lengths > 0)
    given = Given(
      tokens=stored.tokens,
      lengths=jnp.where(taken, stored.lengths, 0),
      complete=taken | source.replayed,
    )
    rollout = sampling.complete(
      self.decoder, copy, prompts, given, prefixes=prefixes, **options
    )
    rows = stored.lengths.shape[0]
    key = jax.random.fold_in(self._given_key(step), 1)
    kept = self.replay.pull(replay, rows, key)
    return jax.tree.map(
      lambda old, new: jnp.where(source.replayed, old, new), kept, rollout
    )

  def score(self, frozen: Frozen, batch: ScoringBatch) -> Observed:
    """What the frozen models say of the drawn tokens, by itself."""
    roles = [role for role in self.objective.needs.roles() if role in frozen]

    def score_part(part: ScoringBatch) -> Observed:
      _, observed = self.scorer.fields(
        self.objective.needs,
        {role: self.scorer.hidden(role, frozen[role], part) for role in roles},
        {role: self.scorer.head(role, frozen[role]) for role in roles},
        part,
      )
      return observed

    if self.micro_batches == 1:
      return score_part(batch)
    return self._join(jax.lax.map(score_part, self._cut(batch)))

  def train(
    self, state: TrainState, frozen: Frozen, inputs: StepInputs
  ) -> tuple[TrainState, Metrics, Rollout]:
    """The whole step: rollout, scoring, objective, update."""
    rollout = self.rollout(
      state.params, frozen, state.step, inputs, state.replay
    )
    state, metrics = self.update_from(state, frozen, inputs, rollout)
    return state, metrics, rollout

  def update_from(
    self,
    state: TrainState,
    frozen: Frozen,
    inputs: StepInputs,
    rollout: Rollout,
  ) -> tuple[TrainState, Metrics]:
    """The second half of `train`, the rollout being given."""
    batch = self.scoring_batch(rollout, inputs)
    buffer = state.replay
    if self.replay is not None:
      source = self._source(buffer, state.step, inputs)
      buffer = self.replay.push(buffer, rollout, source.fresh)
    filled = buffer.get("filled")
    state, metrics = self.update(
      state, frozen, batch, pure_sampling=self.sampling.is_pure
    )
    state = dataclasses.replace(state, replay=buffer)
    metrics = {**metrics, **rollout_metrics(rollout)}
    if inputs.given is not None:
      metrics |= given_metrics(rollout)
    if inputs.replay_threshold is not None and filled is not None:
      metrics["replay/threshold"] = inputs.replay_threshold
      metrics["replay/filled"] = filled.astype(jnp.float32)
    if inputs.teacher_prompts is not None:
      metrics["teacher/prompt_length_mean"] = jnp.mean(
        inputs.teacher_prompts.lengths, dtype=jnp.float32
      )
    return state, metrics

  def scoring_batch(self, rollout: Rollout, inputs: StepInputs) -> ScoringBatch:
    """All tokens carry loss; those drawn have a behavior log-probability."""
    rows = rollout.tokens.shape[0]
    privileged, teacher_prompts = jax.tree.map(
      lambda leaf: jnp.repeat(leaf, self.rollouts, axis=0),
      (inputs.privileged, inputs.teacher_prompts),
    )
    return ScoringBatch(
      prompts=rollout.prompts,
      privileged=privileged,
      teacher_prompts=teacher_prompts,
      tokens=rollout.tokens,
      lengths=rollout.lengths,
      sampled_mask=rollout.sampled_mask,
      loss_mask=completion_mask(rollout),
      behavior_valid=rollout.sampled_mask,
      behavior_logprobs=rollout.behavior_logprobs,
      group=jnp.arange(rows, dtype=jnp.int32) // self.rollouts,
    )

  def _rows(self, batch: PromptBatch) -> PromptBatch:
    """Ids spread over the devices as they are decoded."""
    layout = self.decoder.layout
    return PromptBatch(
      tokens=layout.constrain(batch.tokens, ("batch", None)),
      lengths=layout.constrain(batch.lengths, ("batch",)),
    )

  def _given_key(self, step: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(self._key(step), _GIVEN)

  def _source(
    self, replay: State, step: Int[Array, ""], inputs: StepInputs
  ) -> Source:
    """What this step trains on, the same in both halves of it."""
    if self.replay is None or inputs.replay_threshold is None:
      raise ValueError("this run has no replay buffer")
    return self.replay.source(
      replay,
      inputs.replay_threshold,
      self.schedule(step).progress,
      self._given_key(step),
    )


def completion_mask(rollout: Rollout) -> Bool[Array, "B T"]:
  """The tokens of completions, drawn or given."""
  index = jnp.arange(rollout.tokens.shape[1])[None, :]
  return index < rollout.lengths[:, None]


def given_metrics(rollout: Rollout) -> Metrics:
  """What of the completions was given: fractions, and tokens a row."""
  drawn = jnp.sum(rollout.sampled_mask, axis=1, dtype=jnp.int32)
  lengths = (rollout.lengths - drawn).astype(jnp.float32)
  total = jnp.sum(rollout.lengths, dtype=jnp.float32)
  return {
    "rollout/given_rows": jnp.mean(lengths > 0, dtype=jnp.float32),
    "rollout/given_tokens": jnp.sum(lengths) / jnp.maximum(total, 1.0),
    "rollout/given_length_mean": jnp.mean(lengths),
  }


def rollout_metrics(rollout: Rollout) -> Metrics:
  """Lengths in tokens, and the fraction that ran into the limit."""
  lengths = rollout.lengths.astype(jnp.float32)
  return {
    "rollout/prompt_length_mean": jnp.mean(
      rollout.prompts.lengths, dtype=jnp.float32
    ),
    "rollout/tokens": jnp.sum(rollout.sampled_mask, dtype=jnp.float32),
    "rollout/length_mean": jnp.mean(lengths),
    "rollout/length_max": jnp.max(lengths),
    "rollout/truncated": jnp.mean(
      rollout.stop_reason == STOP_LENGTH, dtype=jnp.float32
    ),
  }
