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
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from opd_jax import sampling
from opd_jax.config import SamplingConfig
from opd_jax.gradient import Evaluation, evaluate
from opd_jax.models import Model
from opd_jax.objectives import reduce
from opd_jax.objectives.base import Objective, Schedule, Signals
from opd_jax.optim import state_shardings
from opd_jax.scoring import Observed, Parameters, Scorer, bundle_scores
from opd_jax.types import (
  STOP_LENGTH,
  ModelScores,
  Params,
  PromptBatch,
  Rollout,
  ScoringBatch,
  StepInputs,
  TrainState,
)

Metrics = Mapping[str, Float[Array, ""]]
Frozen = Mapping[str, Params]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """All that is static about a step; its methods are pure and jit-able.

  Attributes:
    decoder: the student in the decode layout.
    scorer: the models in the training layout.
    objective: what is descended.
    optimizer: turns gradients into updates.
    learning_rate: for the log, by step.
    sampling: how completions are drawn.
    stop_ids: that end them.
    rollouts: G, completions per prompt.
    micro_batches: parts of the batch the gradient is summed over.
    steps: of the whole run.
    seed: of every draw.
  """

  decoder: Model
  scorer: Scorer
  objective: Objective
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  sampling: SamplingConfig
  stop_ids: tuple[int, ...]
  rollouts: int
  micro_batches: int
  steps: int
  seed: int

  def init_state(self, params: Params) -> TrainState:
    """The state before the first step."""
    return init_state(params, self.optimizer, self.objective)

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and places of the state, before any weight exists."""
    return abstract_state(self.scorer.student, self.optimizer, self.objective)

  @jax.named_scope("rollout")
  def rollout(
    self, params: Params, step: Int[Array, ""], prompts: PromptBatch
  ) -> Rollout:
    """Draws the completions of a step; the key is (seed, step)."""
    layout = self.decoder.layout
    prompts = PromptBatch(
      tokens=layout.constrain(prompts.tokens, ("batch", None)),
      lengths=layout.constrain(prompts.lengths, ("batch",)),
    )
    return sampling.sample(
      self.decoder,
      self._decode_params(params),
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

  @jax.named_scope("gradient")
  def gradient(
    self, state: TrainState, frozen: Frozen, batch: ScoringBatch
  ) -> Evaluation:
    """Value and gradient of the objective on a whole batch."""
    parameters = Parameters(student=state.params, **frozen)
    counts = reduce.Counts.of(batch.loss_mask)
    schedule = Schedule(
      step=state.step,
      progress=state.step.astype(jnp.float32) / self.steps,
    )

    def prepare(fields: Mapping[str, ModelScores]) -> Signals:
      bundle = bundle_scores(batch, fields)
      return self.objective.prepare(bundle, state.objective, schedule)

    if self.micro_batches == 1:
      return evaluate(
        self.scorer, self.objective, parameters, batch, counts, prepare
      )
    return self._accumulate(parameters, batch, counts, prepare)

  def update(
    self, state: TrainState, frozen: Frozen, batch: ScoringBatch
  ) -> tuple[TrainState, Metrics]:
    """Scores, descends and updates on completions that exist."""
    evaluation = self.gradient(state, frozen, batch)
    with jax.named_scope("optimizer"):
      updates, optimizer = self.optimizer.update(
        evaluation.gradients, state.optimizer, state.params
      )
    new_state = TrainState(
      step=state.step + 1,
      params=jax.tree.map(jnp.add, state.params, updates),
      optimizer=optimizer,
      objective=dict(
        self.objective.update_state(state.objective, evaluation.statistics)
      ),
    )
    metrics = {
      **step_metrics(evaluation, batch, self.sampling.is_pure),
      "optimizer/grad_norm": optax.tree.norm(evaluation.gradients),
      "optimizer/learning_rate": jnp.asarray(
        self.learning_rate(state.step), jnp.float32
      ),
    }
    return new_state, metrics

  def train(
    self, state: TrainState, frozen: Frozen, inputs: StepInputs
  ) -> tuple[TrainState, Metrics, Rollout]:
    """The whole step: rollout, scoring, objective, update."""
    rollout = self.rollout(state.params, state.step, inputs.prompts)
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
    state, metrics = self.update(state, frozen, batch)
    return state, {**metrics, **rollout_metrics(rollout)}

  def scoring_batch(self, rollout: Rollout, inputs: StepInputs) -> ScoringBatch:
    """All drawn tokens carry loss and have a behavior log-probability."""
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
      lengths=jnp.sum(rollout.sampled_mask, axis=1, dtype=jnp.int32),
      sampled_mask=rollout.sampled_mask,
      loss_mask=rollout.sampled_mask,
      behavior_valid=rollout.sampled_mask,
      behavior_logprobs=rollout.behavior_logprobs,
      group=jnp.arange(rows, dtype=jnp.int32) // self.rollouts,
    )

  def _key(self, step: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(self.seed), step)

  def _decode_params(self, params: Params) -> Params:
    """The compute-dtype copy in the decode layout: gathered here, once."""
    places = self.decoder.layout.tree_shardings(
      self.decoder.logical_axes(), params
    )

    def cast(path: Any, leaf: Array) -> Array:
      # Norms are applied in float32: rounding their scales would only add to
      # the mismatch between decoding and scoring.
      if path[-1].key == "scale":
        return leaf
      return leaf.astype(self.decoder.compute_dtype)

    copy = jax.tree_util.tree_map_with_path(cast, params)
    return jax.lax.with_sharding_constraint(copy, places)

  def _accumulate(
    self,
    parameters: Parameters,
    batch: ScoringBatch,
    counts: reduce.Counts,
    prepare: Any,
  ) -> Evaluation:
    """Sums the evaluation over micro-batches, every normaliser being global."""
    parts = self._cut((batch, counts.tokens_in_row))

    def fields_of(part: Any) -> Any:
      return self.scorer.prepare_fields(self.objective, parameters, part[0])

    found = jax.lax.map(fields_of, parts)
    signals = prepare(self._join(found[0]))
    by_row = self._cut((dict(signals.token), dict(signals.row)))

    def evaluate_part(part: Any) -> Evaluation:
      (rows, tokens_in_row), fields, (token, row) = part
      return evaluate(
        self.scorer,
        self.objective,
        parameters,
        rows,
        dataclasses.replace(counts, tokens_in_row=tokens_in_row),
        lambda _: dataclasses.replace(signals, token=token, row=row),
        fields,
      )

    def body(total: Evaluation, part: Any) -> tuple[Evaluation, Any]:
      evaluation = evaluate_part(part)
      sums = dataclasses.replace(evaluation, observed={})
      return jax.tree.map(jnp.add, total, sums), evaluation.observed

    scanned = (parts, found, by_row)
    shapes = jax.eval_shape(
      evaluate_part, jax.tree.map(lambda leaf: leaf[0], scanned)
    )
    zero = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
      dataclasses.replace(shapes, observed={}),
    )
    total, observed = jax.lax.scan(body, zero, scanned)
    return dataclasses.replace(total, observed=self._join(observed))

  def _cut(self, tree: Any) -> Any:
    """[B, ...] -> [parts, B / parts, ...], every shard keeping its rows."""
    layout = self.scorer.student.layout

    def leaf(array: Array) -> Array:
      rows = array.shape[0] // self.micro_batches
      shape = (rows, self.micro_batches, *array.shape[1:])
      array = array.reshape(shape).swapaxes(0, 1)
      axes = (None, "batch") + (None,) * (array.ndim - 2)
      return layout.constrain(array, axes)

    return jax.tree.map(leaf, tree)

  def _join(self, tree: Any) -> Any:
    """The inverse of `_cut`."""

    def leaf(array: Array) -> Array:
      return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])

    return jax.tree.map(leaf, tree)


def init_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  objective: Objective,
) -> TrainState:
  """The state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    optimizer=optimizer.init(params),
    objective=dict(objective.init_state()),
  )


def abstract_state(
  student: Model,
  optimizer: optax.GradientTransformation,
  objective: Objective,
) -> TrainState:
  """`ShapeDtypeStruct`s of a state with its places; moments beside weights."""
  params = student.abstract_params()
  everywhere = student.layout.replicated()
  shapes = jax.eval_shape(
    lambda params: init_state(params, optimizer, objective), params
  )
  param_places = jax.tree.map(lambda leaf: leaf.sharding, params)
  places = dataclasses.replace(
    jax.tree.map(lambda _: everywhere, shapes),
    params=param_places,
    optimizer=state_shardings(optimizer, params, param_places, everywhere),
  )
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    shapes,
    places,
  )


def step_metrics(
  evaluation: Evaluation, batch: ScoringBatch, pure_sampling: bool
) -> Metrics:
  """What a step tells, from before its update; means run over loss tokens.

  `train/loss` is the sum of the terms `loss/NAME`; `teacher/kl` the mean of
  log student - log teacher over drawn tokens, the sampled estimate of
  KL(student || teacher) in nats; `mismatch` compares the log-probabilities of
  the sampler and of the scoring forward of the same weights. Both mean this
  only where the tokens are drawn from the student's whole distribution
  (`pure_sampling`), and are left out elsewhere.
  """
  mask = batch.loss_mask
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)

  def mean(values: Float[Array, "B T"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, values, 0.0)) / count

  metrics = {"train/loss": sum(evaluation.losses.values(), jnp.float32(0.0))}
  metrics |= {f"loss/{k}": v for k, v in evaluation.losses.items()}
  metrics |= {f"objective/{k}": v for k, v in evaluation.statistics.items()}
  for role, seen in evaluation.observed.items():
    metrics[f"{role}/entropy"] = mean(seen["entropy"])
    if "masked_mass" in seen:
      metrics[f"{role}/masked_mass"] = mean(seen["masked_mass"])
  student = evaluation.observed.get("student")
  if student is not None and pure_sampling:
    valid = mask & batch.behavior_valid
    gap = jnp.abs(student["logprobs"] - batch.behavior_logprobs)
    gap = jnp.where(valid, gap, 0.0)
    valid_count = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)
    metrics["mismatch/mean"] = jnp.sum(gap) / valid_count
    metrics["mismatch/max"] = jnp.max(gap)
    teacher = evaluation.observed.get("teacher")
    if teacher is not None:
      metrics["teacher/kl"] = mean(student["logprobs"] - teacher["logprobs"])
  return metrics


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
