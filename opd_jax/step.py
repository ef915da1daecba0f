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
from jaxtyping import Array, Float, Int

from opd_jax import sampling
from opd_jax.config import SamplingConfig
from opd_jax.models import Model
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Update):
  """All that is static about a step; its methods are pure and jit-able.

  Attributes:
    decoder: the student in the decode layout.
    sampling: how completions are drawn.
    stop_ids: that end them.
    rollouts: G, completions per prompt.
  """

  decoder: Model
  sampling: SamplingConfig
  stop_ids: tuple[int, ...]
  rollouts: int

  @jax.named_scope("rollout")
  def rollout(
    self,
    params: Params,
    frozen: Frozen,
    step: Int[Array, ""],
    inputs: StepInputs,
  ) -> Rollout:
    """Draws the completions of a step; the key is (seed, step)."""
    layout = self.decoder.layout
    prompts = PromptBatch(
      tokens=layout.constrain(inputs.prompts.tokens, ("batch", None)),
      lengths=layout.constrain(inputs.prompts.lengths, ("batch",)),
    )
    return sampling.sample(
      self.decoder,
      self.decoder.working_copy(params),
      prompts,
      config=self.sampling,
      stop_ids=self.stop_ids,
      rollouts=self.rollouts,
      key=self._key(step),
      vocab_size=self.scorer.vocab_size,
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
    rollout = self.rollout(state.params, frozen, state.step, inputs)
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
    state, metrics = self.update(
      state, frozen, batch, pure_sampling=self.sampling.is_pure
    )
    metrics = {**metrics, **rollout_metrics(rollout)}
    if rollout.rewards is not None:
      metrics |= reward_metrics(rollout.rewards, self.rollouts)
    if inputs.teacher_prompts is not None:
      metrics["teacher/prompt_length_mean"] = jnp.mean(
        inputs.teacher_prompts.lengths, dtype=jnp.float32
      )
    return state, metrics

  def scoring_batch(self, rollout: Rollout, inputs: StepInputs) -> ScoringBatch:
    """All drawn tokens carry loss and have a behavior log-probability."""
    rows = rollout.tokens.shape[0]
    privileged, teacher_prompts, sources = jax.tree.map(
      lambda leaf: jnp.repeat(leaf, self.rollouts, axis=0),
      (inputs.privileged, inputs.teacher_prompts, inputs.sources),
    )
    return ScoringBatch(
      prompts=rollout.prompts,
      privileged=privileged,
      teacher_prompts=teacher_prompts,
      tokens=rollout.tokens,
      lengths=jnp.sum(rollout.sampled_mask, axis=1, dtype=jnp.int32),
      sampled_mask=rollout.sampled_mask,
      loss_mask=rollout.sampled_mask,
      behavior_valid=rollout.sampled_mask,
      behavior_logprobs=rollout.behavior_logprobs,
      group=jnp.arange(rows, dtype=jnp.int32) // self.rollouts,
      rewards=rollout.rewards,
      sources=sources,
    )


def rollout_metrics(rollout: Rollout) -> Metrics:
  """Lengths in tokens, and the fraction that ran into the limit."""
  lengths = jnp.sum(rollout.sampled_mask, axis=1, dtype=jnp.float32)
  return {
    "rollout/prompt_length_mean": jnp.mean(
      rollout.prompts.lengths, dtype=jnp.float32
    ),
    "rollout/tokens": jnp.sum(lengths),
    "rollout/length_mean": jnp.mean(lengths),
    "rollout/length_max": jnp.max(lengths),
    "rollout/truncated": jnp.mean(
      rollout.stop_reason == STOP_LENGTH, dtype=jnp.float32
    ),
  }


def reward_metrics(rewards: Float[Array, " B"], rollouts: int) -> Metrics:
  """Mean and deviation over all completions, and groups that agree.

  A group whose rewards are all equal has no advantage to tell.
  """
  groups = rewards.reshape(-1, rollouts)
  equal = jnp.max(groups, axis=1) == jnp.min(groups, axis=1)
  return {
    "reward/mean": jnp.mean(rewards),
    "reward/std": jnp.std(rewards),
    "reward/equal_groups": jnp.mean(equal, dtype=jnp.float32),
  }
