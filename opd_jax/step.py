"""One step of on-policy distillation, as one compiled program or as two.

  1. Reshard a compute-dtype copy of the student into the decode layout, once.
  2. Sample G completions per prompt.
  3. Score them: the student with gradient, teacher and reference without.
  4. `prepare` looks at the whole batch, `terms` at its parts; sum the gradient.
  5. Update.

`fused` is 1-5 in one program. `split` is 1-2 and 3-5 in two, for objectives
that need the host in between. They are made of the same functions and draw the
same tokens. 3-5 may be repeated, on parts of the batch and in several passes
over it, inside the same program. Programs are compiled ahead of the first step
and cannot recompile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax import sampling
from opd_jax.config import RolloutConfig, SamplingConfig
from opd_jax.models import Model
from opd_jax.objectives.base import Needs, Request
from opd_jax.replay import Source, State
from opd_jax.sampling import Decoder, Given
from opd_jax.scoring import Observed, Parameters
from opd_jax.types import (
  STOP_LENGTH,
  Params,
  PromptBatch,
  Rollout,
  ScoringBatch,
  StepInputs,
  TrainState,
)
from opd_jax.update import Frozen, Metrics, Turn, Update

# Metrics that are about the student that drew the tokens.
_OF_THE_FIRST = ("mismatch/", "teacher/kl")

# Folded into the key of a step for what is given; see `update` for the others.
_GIVEN = 2**31 - 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Update):
  """All that is static about a step; its methods are pure and jit-able.

  Attributes:
    decoder: the student in the decode layout.
    teacher_decoder: the teacher in it; None where it draws nothing.
    sampling: how completions are drawn.
    stop_ids: that end them.
    rollouts: G, completions per prompt.
    mini_batches: parts of the rollout batch that get an update each.
    epochs: passes over the rollout batch.
    mixing: who writes the completions besides the student.
  """

  decoder: Model
  teacher_decoder: Model | None = None
  sampling: SamplingConfig
  stop_ids: tuple[int, ...]
  rollouts: int
  mixing: RolloutConfig
  mini_batches: int = 1
  epochs: int = 1

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
      params: what is trained of the student's.
      frozen: the other weights, by role.
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
    decoder, weights = self._drawing(params, frozen)
    if inputs.given is None:
      return sampling.sample(decoder, weights, prompts, **options)
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
        decoder, weights, prompts, given, prefixes=prefixes, **options
      )
    source = self._source(replay, step, inputs)
    taken = ~source.fresh & (stored.lengths > 0)
    given = Given(
      tokens=stored.tokens,
      lengths=jnp.where(taken, stored.lengths, 0),
      complete=taken | source.replayed,
    )
    rollout = sampling.complete(
      decoder, weights, prompts, given, prefixes=prefixes, **options
    )
    rows = stored.lengths.shape[0]
    key = jax.random.fold_in(self._given_key(step), 1)
    kept = self.replay.pull(replay, rows, key)
    return jax.tree.map(
      lambda old, new: jnp.where(source.replayed, old, new), kept, rollout
    )

  def _drawing(self, params: Params, frozen: Frozen) -> tuple[Decoder, Params]:
    """What tokens are drawn from, and its weights in the decode layout."""
    student = Parameters(student=params, **frozen).of("student")
    weights = self.decoder.working_copy(student)
    if self.teacher_decoder is None:
      return self.decoder, weights
    mixed = sampling.MixedDecoder(
      student=self.decoder,
      teacher=self.teacher_decoder,
      teacher_mix=self.mixing.teacher_mix,
      temperature=self.sampling.temperature,
      vocab_size=self.scorer.vocab_size,
    )
    teacher = self.teacher_decoder.working_copy(frozen["teacher"])
    return mixed, {"student": weights, "teacher": teacher}

  @property
  def pure_sampling(self) -> bool:
    """Whether tokens are drawn from the student's whole distribution."""
    return self.sampling.is_pure and self.teacher_decoder is None

  @property
  def frozen_roles(self) -> tuple[str, ...]:
    """The frozen models that run over the rows, whoever reads them."""
    roles = self.objective.frozen_roles()
    if self.selector is not None:
      chosen_by = [role for role in self.selector.roles if role != "student"]
      roles = tuple(dict.fromkeys((*roles, *chosen_by)))
    return roles

  def score(self, frozen: Frozen, batch: ScoringBatch) -> Observed:
    """What the frozen models say of the drawn tokens, by itself."""
    roles = self.frozen_roles

    def score_part(part: ScoringBatch) -> Observed:
      found = self.scorer.fields(
        self.objective.needs,
        {role: self.scorer.hidden(role, frozen[role], part) for role in roles},
        {role: self.scorer.head(role, frozen[role]) for role in roles},
        part,
      )
      return found.observed

    return self._by_parts(score_part, batch)

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
    if self.mini_batches * self.epochs == 1:
      state, metrics = self.update(
        state, frozen, batch, pure_sampling=self.pure_sampling
      )
    else:
      state, metrics = self._updates(state, frozen, batch)
    state = dataclasses.replace(state, replay=buffer)
    metrics = {**metrics, **rollout_metrics(rollout)}
    if inputs.given is not None:
      metrics |= given_metrics(rollout)
    if inputs.replay_threshold is not None and filled is not None:
      metrics["replay/threshold"] = inputs.replay_threshold
      metrics["replay/filled"] = filled.astype(jnp.float32)
    if rollout.rewards is not None:
      metrics |= reward_metrics(rollout.rewards, self.rollouts)
    if inputs.teacher_prompts is not None:
      metrics["teacher/prompt_length_mean"] = jnp.mean(
        inputs.teacher_prompts.lengths, dtype=jnp.float32
      )
    return state, metrics

  def _updates(
    self, state: TrainState, frozen: Frozen, batch: ScoringBatch
  ) -> tuple[TrainState, Metrics]:
    """All updates of a step; its metrics are those of `over_updates`."""
    if self.scores_start:
      parameters = Parameters(student=state.params, **frozen)
      start = self.start_logprobs(parameters.of("student"), batch)
      batch = dataclasses.replace(batch, start_logprobs=start)
    parts = self.mini_batch_parts(batch)
    count = self.mini_batches * self.epochs

    def body(
      state: TrainState, number: Int[Array, ""]
    ) -> tuple[TrainState, Metrics]:
      mini_batch = number % self.mini_batches
      turn = Turn(mini_batch, number.astype(jnp.float32) / count)
      part = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(
          leaf, mini_batch, keepdims=False
        ),
        parts,
      )
      new, metrics = self.update(
        state, frozen, part, pure_sampling=self.pure_sampling, turn=turn
      )
      # The step is the rollout batch: it ends behind the last update.
      return dataclasses.replace(new, step=state.step), metrics

    numbers = jnp.arange(count, dtype=jnp.int32)
    state, found = jax.lax.scan(body, state, numbers)
    metrics = {
      name: over_updates(name, values) for name, values in found.items()
    }
    return dataclasses.replace(state, step=state.step + 1), metrics

  @property
  def scores_start(self) -> bool:
    """Whether the student scores the rollout batch before the updates."""
    needs = (self.objective.needs, self.objective.prepare_needs)
    several = self.mini_batches * self.epochs > 1
    return several and any(need.start for need in needs)

  def mini_batch_parts(self, batch: ScoringBatch) -> ScoringBatch:
    """[B, ...] -> [mini_batches, B / mini_batches, ...], by whole prompts.

    Mini-batch m has the prompts m, m + mini_batches, ...; groups are numbered
    anew in each.
    """
    parts = self._cut(batch, self.mini_batches, together=self.rollouts)
    return dataclasses.replace(parts, group=parts.group // self.mini_batches)

  @jax.named_scope("start")
  def start_logprobs(
    self, params: Params, batch: ScoringBatch
  ) -> Float[Array, "B T"]:
    """What the student says of the drawn tokens, without gradient."""
    needs = Needs(student=Request(logprobs=True))
    head = self.scorer.head("student", params)

    def score_part(part: ScoringBatch) -> Float[Array, "B T"]:
      hidden = self.scorer.hidden("student", params, part)
      found = self.scorer.fields(
        needs, {"student": hidden}, {"student": head}, part
      )
      return found.fields["student"].logprobs

    return self._by_parts(score_part, batch)

  def _by_parts(
    self, function: Callable[[ScoringBatch], Any], batch: ScoringBatch
  ) -> Any:
    """Applies a function of rows to as many rows at a time as an update."""
    parts = self.mini_batches * self.micro_batches
    if parts == 1:
      return function(batch)
    return self._join(jax.lax.map(function, self._cut(batch, parts)))

  def scoring_batch(self, rollout: Rollout, inputs: StepInputs) -> ScoringBatch:
    """All tokens carry loss; those drawn have a behavior log-probability."""
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
      lengths=rollout.lengths,
      sampled_mask=rollout.sampled_mask,
      loss_mask=completion_mask(rollout),
      behavior_valid=rollout.sampled_mask,
      behavior_logprobs=rollout.behavior_logprobs,
      group=jnp.arange(rows, dtype=jnp.int32) // self.rollouts,
      rewards=rollout.rewards,
      sources=sources,
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


def over_updates(name: str, values: Float[Array, " U"]) -> Float[Array, ""]:
  """One value of a step from those of its updates: mean, maximum or first.

  The first is that of the first update that has drawn tokens (of a source, in
  `teacher/kl/NAME`). `drift` passes over those that have none.
  """
  if name.startswith(_OF_THE_FIRST):
    return values[jnp.argmax(~jnp.isnan(values))]
  if name.startswith("drift/"):
    return (jnp.nanmax if name.endswith("max") else jnp.nanmean)(values)
  return (jnp.max if name.endswith("max") else jnp.mean)(values)


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
  """Lengths in tokens, and of the rows drawn in, those cut at the limit."""
  drawn = jnp.any(rollout.sampled_mask, axis=1)
  truncated = drawn & (rollout.stop_reason == STOP_LENGTH)
  rows = jnp.maximum(jnp.sum(drawn, dtype=jnp.float32), 1.0)
  lengths = rollout.lengths.astype(jnp.float32)
  return {
    "rollout/prompt_length_mean": jnp.mean(
      rollout.prompts.lengths, dtype=jnp.float32
    ),
    "rollout/tokens": jnp.sum(rollout.sampled_mask, dtype=jnp.float32),
    "rollout/length_mean": jnp.mean(lengths),
    "rollout/length_max": jnp.max(lengths),
    "rollout/truncated": jnp.sum(truncated, dtype=jnp.float32) / rows,
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
