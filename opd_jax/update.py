"""The second half of a step: score, descend, update.

`prepare` of an objective looks at the whole batch, `terms` at its parts; the
gradient is summed over micro-batches, every normaliser being global. What the
rows are and where they come from is the business of the step: completions drawn
by the student (`step.py`), or packed examples (`sft.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from opd_jax.gradient import Evaluation, evaluate
from opd_jax.models import Model
from opd_jax.objectives import reduce
from opd_jax.objectives.base import Objective, Schedule, Signals
from opd_jax.optim import state_shardings
from opd_jax.scoring import Parameters, Scorer, Weights, bundle_scores
from opd_jax.types import (
  ModelScores,
  Params,
  ScoringBatch,
  TrainState,
)

Metrics = Mapping[str, Float[Array, ""]]
Frozen = Mapping[str, Weights]

# Folded into the key of a step for the objective; the sampler folds in rows.
_OBJECTIVE = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
  """All that is static about an update; its methods are pure and jit-able.

  Attributes:
    scorer: the models in the training layout.
    objective: what is descended.
    optimizer: turns gradients into updates.
    learning_rate: for the log, by step.
    micro_batches: parts of the batch the gradient is summed over.
    steps: of the whole run.
    seed: of every draw.
    sources: names of the data sources, where rows say what theirs is.
  """

  scorer: Scorer
  objective: Objective
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  micro_batches: int
  steps: int
  seed: int
  sources: tuple[str, ...] = ()

  def init_state(self, params: Params) -> TrainState:
    """The state before the first step."""
    return init_state(params, self.optimizer, self.objective)

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and places of the state, before any weight exists."""
    return abstract_state(self.scorer.student, self.optimizer, self.objective)

  def place_state(self, params: Params) -> TrainState:
    """The state before the first step, in its places; uses up the weights."""
    places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
    init = jax.jit(self.init_state, donate_argnums=0, out_shardings=places)
    return init(params)

  @jax.named_scope("gradient")
  def gradient(
    self, state: TrainState, frozen: Frozen, batch: ScoringBatch
  ) -> Evaluation:
    """Value and gradient of the objective on a whole batch."""
    parameters = Parameters(student=state.params, **frozen)
    counts = reduce.Counts.of(batch.loss_mask)
    schedule = self.schedule(state.step)

    def prepare(fields: Mapping[str, ModelScores]) -> Signals:
      bundle = bundle_scores(batch, fields)
      return self.objective.prepare(bundle, state.objective, schedule)

    if self.micro_batches == 1:
      return evaluate(
        self.scorer, self.objective, parameters, batch, counts, prepare
      )
    return self._accumulate(parameters, batch, counts, prepare)

  def update(
    self,
    state: TrainState,
    frozen: Frozen,
    batch: ScoringBatch,
    *,
    pure_sampling: bool,
  ) -> tuple[TrainState, Metrics]:
    """Scores, descends and updates on rows that exist.

    Args:
      state: before the update.
      frozen: weights of the other models, by role.
      batch: the rows.
      pure_sampling: whether the student drew the tokens from its whole
        distribution; see `step_metrics`.
    """
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
      **step_metrics(evaluation, batch, pure_sampling, self.sources),
      "optimizer/grad_norm": optax.tree.norm(evaluation.gradients),
      "optimizer/learning_rate": jnp.asarray(
        self.learning_rate(state.step), jnp.float32
      ),
    }
    return new_state, metrics

  def schedule(self, step: Int[Array, ""]) -> Schedule:
    """What an objective knows of the place of a step in the run."""
    return Schedule(
      step=step,
      progress=step.astype(jnp.float32) / self.steps,
      key=jax.random.fold_in(self._key(step), _OBJECTIVE),
    )

  def _key(self, step: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(self.seed), step)

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
  evaluation: Evaluation,
  batch: ScoringBatch,
  pure_sampling: bool,
  sources: tuple[str, ...] = (),
) -> Metrics:
  """What a step tells, from before its update; means run over loss tokens.

  `train/loss` is the sum of the terms `loss/NAME`; `teacher/kl` the mean of
  log student - log teacher over drawn tokens, the sampled estimate of
  KL(student || teacher) in nats; `mismatch` compares the log-probabilities of
  the sampler and of the scoring forward of the same weights. Both mean this
  only where the tokens are drawn from the student's whole distribution
  (`pure_sampling`), and are left out elsewhere. `teacher/kl/NAME` is of the
  rows of a source alone, and NaN in a step that has none.
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
      gap = student["logprobs"] - teacher["logprobs"]
      metrics["teacher/kl"] = mean(gap)
      if batch.sources is not None:
        for index, name in enumerate(sources):
          own = mask & (batch.sources == index)[:, None]
          metrics[f"teacher/kl/{name}"] = jnp.mean(gap, where=own)
  return metrics
