"""The second half of a step: score, descend, update.

`prepare` of an objective looks at the whole batch, `terms` at its parts; the
gradient is summed over micro-batches, every normaliser being global. What the
rows are and where they come from is the business of the step: completions drawn
by the student (`step.py`), or packed examples (`sft.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax.gradient import Evaluation, Prepared, evaluate, first_pass
from opd_jax.models import Model
from opd_jax.objectives import reduce
from opd_jax.objectives.base import Objective, Schedule
from opd_jax.optim import state_shardings
from opd_jax.replay import Buffer
from opd_jax.scoring import Found, Parameters, Scorer, Weights, bundle_scores
from opd_jax.selector import Selector
from opd_jax.types import (
  Params,
  ScoringBatch,
  TrainState,
)

Metrics = Mapping[str, Float[Array, ""]]
Frozen = Mapping[str, Weights]

# Folded into the key of a step for the objective and for the selector; the
# sampler folds in rows, `step.py` another for what is given.
_OBJECTIVE = 2**31 - 1
_SELECTOR = 2**31 - 3


class Turn(NamedTuple):
  """Which of several updates of a step one is.

  Attributes:
    mini_batch: the part of the rollout batch that it learns from.
    progress: part of the step's updates done before it, in [0, 1).
  """

  mini_batch: Int[Array, ""]
  progress: Float[Array, ""]


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
    selector: chooses the tokens that carry loss; None for all.
    replay: the buffer of completions to be trained on again, if there is one.
    sources: names of the data sources, where rows say what theirs is.
  """

  scorer: Scorer
  objective: Objective
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  micro_batches: int
  steps: int
  seed: int
  selector: Selector | None = None
  replay: Buffer | None = None
  sources: tuple[str, ...] = ()

  def init_state(self, params: Params) -> TrainState:
    """The state before the first step."""
    return init_state(params, self.optimizer, self.objective, self.replay)

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and places of the state, before any weight exists."""
    return abstract_state(
      self.scorer.student, self.optimizer, self.objective, self.replay
    )

  def place_state(self, params: Params) -> TrainState:
    """The state before the first step, in its places; uses up the weights."""
    places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
    init = jax.jit(self.init_state, donate_argnums=0, out_shardings=places)
    return init(params)

  @jax.named_scope("gradient")
  def gradient(
    self,
    state: TrainState,
    frozen: Frozen,
    batch: ScoringBatch,
    turn: Turn | None = None,
  ) -> Evaluation:
    """Value and gradient of the objective on the whole batch of an update."""
    parameters = Parameters(student=state.params, **frozen)
    objective = self.objective
    if batch.start_logprobs is None:
      objective = objective.starting_here()

    def prepare(found: Found) -> Prepared:
      return self._prepare(objective, state, batch, found, turn)

    if self.micro_batches == 1:
      return evaluate(
        self.scorer, objective, self.selector, parameters, batch, prepare
      )
    return self._accumulate(objective, parameters, batch, prepare)

  def _prepare(
    self,
    objective: Objective,
    state: TrainState,
    batch: ScoringBatch,
    found: Found,
    turn: Turn | None,
  ) -> Prepared:
    """Looks at the whole batch: chooses tokens, counts them, and `prepare`."""
    fields, selected = found.fields, {}
    if self.selector is not None:
      mask = batch.loss_mask
      key = self._draws(state.step, _SELECTOR, turn)
      scores = self.selector.scores(found.measures, mask, key)
      kept = self.selector.choose(scores, mask)
      selected = {"kept": kept.astype(jnp.float32), "score": scores}
      batch = dataclasses.replace(batch, loss_mask=kept)
      fields = jax.tree.map(lambda leaf: jnp.where(kept, leaf, 0.0), fields)
    return Prepared(
      loss_mask=batch.loss_mask,
      counts=reduce.Counts.of(batch.loss_mask),
      signals=objective.prepare(
        bundle_scores(batch, fields, objective.prepare_needs),
        state.objective,
        self.schedule(state.step, turn),
      ),
      selected=selected,
    )

  def update(
    self,
    state: TrainState,
    frozen: Frozen,
    batch: ScoringBatch,
    *,
    pure_sampling: bool,
    turn: Turn | None = None,
  ) -> tuple[TrainState, Metrics]:
    """Scores, descends and updates on rows that exist.

    Args:
      state: before the update.
      frozen: weights of the other models, by role.
      batch: the rows.
      pure_sampling: whether the student drew the tokens from its whole
        distribution; see `step_metrics`.
      turn: which of several updates of the step this is; None for the only
        one.
    """
    evaluation = self.gradient(state, frozen, batch, turn)
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
      replay=state.replay,
    )
    now = state.step if turn is None else state.step + turn.progress
    metrics = {
      **step_metrics(evaluation, batch, pure_sampling, self.sources),
      "optimizer/grad_norm": optax.tree.norm(evaluation.gradients),
      "optimizer/learning_rate": jnp.asarray(
        self.learning_rate(now), jnp.float32
      ),
    }
    if turn is not None and pure_sampling:
      metrics |= drift_metrics(evaluation, batch)
    return new_state, metrics

  def schedule(
    self, step: Int[Array, ""], turn: Turn | None = None
  ) -> Schedule:
    """What an objective knows of the place of an update in the run."""
    return Schedule(
      step=step,
      progress=step.astype(jnp.float32) / self.steps,
      key=self._draws(step, _OBJECTIVE, turn),
    )

  def _draws(
    self, step: Int[Array, ""], purpose: int, turn: Turn | None
  ) -> Key[Array, ""]:
    """The key of an update's draws, the same in every pass over its rows."""
    key = jax.random.fold_in(self._key(step), purpose)
    if turn is not None:
      key = jax.random.fold_in(key, turn.mini_batch)
    return key

  def _key(self, step: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(self.seed), step)

  def _accumulate(
    self,
    objective: Objective,
    parameters: Parameters,
    batch: ScoringBatch,
    prepare: Callable[[Found], Prepared],
  ) -> Evaluation:
    """Sums the evaluation over micro-batches, every normaliser being global."""
    parts = self._cut(batch, self.micro_batches)

    def first(part: ScoringBatch) -> Found:
      return first_pass(self.scorer, objective, self.selector, parameters, part)

    found = jax.lax.map(first, parts)
    prepared = prepare(self._join(found))

    def evaluate_part(part: Any) -> Evaluation:
      rows, found, by_row = part
      return evaluate(
        self.scorer,
        objective,
        self.selector,
        parameters,
        rows,
        lambda _: prepared.with_rows(by_row),
        found,
      )

    def body(total: Evaluation, part: Any) -> tuple[Evaluation, Any]:
      evaluation = evaluate_part(part)
      sums = dataclasses.replace(evaluation, observed={}, selected={})
      return jax.tree.map(jnp.add, total, sums), evaluation.observed

    scanned = (parts, found, self._cut(prepared.by_row(), self.micro_batches))
    shapes = jax.eval_shape(
      evaluate_part, jax.tree.map(lambda leaf: leaf[0], scanned)
    )
    zero = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
      dataclasses.replace(shapes, observed={}, selected={}),
    )
    total, observed = jax.lax.scan(body, zero, scanned)
    return dataclasses.replace(
      total, observed=self._join(observed), selected=prepared.selected
    )

  def _cut(self, tree: Any, parts: int, together: int = 1) -> Any:
    """[B, ...] -> [parts, B / parts, ...], every shard keeping its rows.

    Args:
      tree: of arrays.
      parts: that every group of `parts` neighbours is dealt out to.
      together: rows in a row that count as one neighbour.
    """
    layout = self.scorer.student.layout

    def leaf(array: Array) -> Array:
      shape = (-1, parts, together, *array.shape[1:])
      array = array.reshape(shape).swapaxes(0, 1)
      array = array.reshape(parts, -1, *array.shape[3:])
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
  replay: Buffer | None = None,
) -> TrainState:
  """The state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    optimizer=optimizer.init(params),
    objective=dict(objective.init_state()),
    replay={} if replay is None else replay.empty(),
  )


def abstract_state(
  student: Model,
  optimizer: optax.GradientTransformation,
  objective: Objective,
  replay: Buffer | None = None,
) -> TrainState:
  """`ShapeDtypeStruct`s of a state with its places; moments beside weights."""
  params = student.abstract_trained()
  everywhere = student.layout.replicated()
  shapes = jax.eval_shape(
    lambda params: init_state(params, optimizer, objective, replay), params
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


def drift_metrics(evaluation: Evaluation, batch: ScoringBatch) -> Metrics:
  """How far the student has moved since it drew the tokens.

  With r = student / behavior of a drawn token, `drift/kl` is the mean of
  r - 1 - log r, an estimate of KL(behavior || student) in nats, never negative;
  `drift/ratio_max` is the largest r. NaN if no token was drawn.
  """
  student = evaluation.observed.get("student")
  if student is None:
    return {}
  valid = batch.loss_mask & batch.behavior_valid
  log_ratio = student["logprobs"] - batch.behavior_logprobs
  log_ratio = jnp.where(valid, log_ratio, 0.0)
  estimate = jnp.expm1(log_ratio) - log_ratio
  ratio = jnp.exp(log_ratio)
  return {
    "drift/kl": _mean_of_drawn(estimate, valid),
    "drift/ratio_max": _max_of_drawn(ratio, valid),
  }


def _mean_of_drawn(
  values: Float[Array, "B T"], drawn: Bool[Array, "B T"]
) -> Float[Array, ""]:
  return _or_nothing(jnp.mean(values, where=drawn), drawn)


def _max_of_drawn(
  values: Float[Array, "B T"], drawn: Bool[Array, "B T"]
) -> Float[Array, ""]:
  return _or_nothing(jnp.max(values, where=drawn, initial=0.0), drawn)


def _or_nothing(
  value: Float[Array, ""], drawn: Bool[Array, "B T"]
) -> Float[Array, ""]:
  """A value of the drawn tokens; NaN, which is not logged, if there are none.

  NaN of the drawn tokens themselves becomes infinite: it stops the run.
  """
  value = jnp.where(jnp.isnan(value), jnp.inf, value)
  return jnp.where(jnp.any(drawn), value, jnp.nan)


def step_metrics(
  evaluation: Evaluation,
  batch: ScoringBatch,
  pure_sampling: bool,
  sources: tuple[str, ...] = (),
) -> Metrics:
  """What a step tells, from before its update; means run over loss tokens.

  With a selector they run over all tokens it could choose from, and tell of the
  models that it looks at; losses and statistics are of the chosen ones.

  `train/loss` is the sum of the terms `loss/NAME`; `teacher/kl` the mean of
  log student - log teacher over drawn tokens, the sampled estimate of
  KL(student || teacher) in nats; `mismatch` compares the log-probabilities of
  the sampler and of the scoring forward of the same weights. Both mean this
  only where the tokens are drawn from the student's whole distribution
  (`pure_sampling`), and are left out elsewhere; they are NaN if no token was
  drawn. `teacher/kl/NAME` is of the rows of a source alone.
  """
  mask = batch.loss_mask
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)

  def mean(values: Float[Array, "B T"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, values, 0.0)) / count

  metrics = {"train/loss": sum(evaluation.losses.values(), jnp.float32(0.0))}
  metrics |= {f"loss/{k}": v for k, v in evaluation.losses.items()}
  metrics |= {f"objective/{k}": v for k, v in evaluation.statistics.items()}
  if evaluation.selected:
    kept = evaluation.selected["kept"]
    chosen = jnp.maximum(jnp.sum(kept), 1.0)
    scores = jnp.where(kept > 0, evaluation.selected["score"], 0.0)
    metrics["selection/fraction"] = jnp.sum(kept) / count
    metrics["selection/score"] = jnp.sum(scores) / chosen
  for role, seen in evaluation.observed.items():
    metrics[f"{role}/entropy"] = mean(seen["entropy"])
    if "masked_mass" in seen:
      metrics[f"{role}/masked_mass"] = mean(seen["masked_mass"])
  student = evaluation.observed.get("student")
  if student is not None and pure_sampling:
    valid = mask & batch.behavior_valid
    gap = jnp.abs(student["logprobs"] - batch.behavior_logprobs)
    metrics["mismatch/mean"] = _mean_of_drawn(gap, valid)
    metrics["mismatch/max"] = _max_of_drawn(gap, valid)
    teacher = evaluation.observed.get("teacher")
    if teacher is not None:
      gap = student["logprobs"] - teacher["logprobs"]
      metrics["teacher/kl"] = _mean_of_drawn(gap, valid)
      if batch.sources is not None:
        for index, name in enumerate(sources):
          own = valid & (batch.sources == index)[:, None]
          metrics[f"teacher/kl/{name}"] = _mean_of_drawn(gap, own)
  return metrics
