"""What the models of a step say of a completion.

A model's trunk turns prompt and completion into hidden states [B, T, D], once.
Its vocabulary head runs over chunks of T, all models' heads in the same loop,
so that no [B, T, V] array exists. `gradient.py` differentiates in such a loop.

Of several teachers each row has its own, that of its data source. All of them
score all rows, and what the others say of a row is dropped: shapes are static,
and a batch may have any number of rows of a source. So a step costs a forward
pass per teacher.

This is the only place that shifts: the state of slot P - 1 + t predicts
completion token t.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opd_jax import sequences
from opd_jax.chunks import Chunks
from opd_jax.models import Model, lora
from opd_jax.objectives import divergences
from opd_jax.objectives.base import (
  ROLES,
  Needs,
  Request,
)
from opd_jax.types import (
  ABSENT,
  MASKED_LOGPROB,
  ModelScores,
  Params,
  Scores,
  ScoringBatch,
)

# Per role, [B, T] arrays of the log: "logprobs" of the token and "entropy" of
# the distribution (nats), and "masked_mass" outside the shared vocabulary.
Observed = Mapping[str, Mapping[str, Float[Array, "B T"]]]

# Of a role: `Params`, and hidden states Float[Array, "B T D"]; of several
# teachers a tuple of them, in the order of `Scorer.models`.
Weights = Any
States = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
  """The weights of a step, by who holds them; of several teachers a tuple.

  Attributes:
    student: what is trained: all weights, or adapters.
    base: the student's weights that adapters belong to; None without adapters.
    teacher: of the frozen teacher, if there is one.
    reference: of the frozen reference, if there is one.
  """

  student: Params
  base: Params | None = None
  teacher: Weights | None = None
  reference: Params | None = None

  def of(self, role: str) -> Weights:
    """The weights behind a role; both student roles share theirs."""
    params = getattr(self, _PLAYER[role])
    if params is None:
      raise ValueError(f"this run has no {role}")
    if params is self.student and self.base is not None:
      return lora.combine(self.base, params)
    return params

  def with_student(self, trained: Params) -> "Parameters":
    """These with another value of what is trained."""
    return dataclasses.replace(self, student=trained)


# Log-probabilities over the vocabulary, and the mass outside the shared ids;
# None for a model that has no other.
_Distribution = tuple[Float[Array, "B C V"], Float[Array, "B C"] | None]

_PLAYER = {
  "student": "student",
  "student_privileged": "student",
  "teacher": "teacher",
  "reference": "reference",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """What a pass without gradient found of some rows.

  Attributes:
    fields: scores by role.
    observed: for the log.
    measures: what was made of whole distributions; 0 where masked.
  """

  fields: Mapping[str, ModelScores]
  observed: Observed
  measures: Mapping[str, Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
  """What to make of whole distributions, where a pass without gradient runs.

  Attributes:
    roles: whose.
    of: their log-probabilities [B, C, V] by role to [B, C] arrays by name.
    slots: the most of a row that a chunk may have.
  """

  roles: tuple[str, ...]
  of: Callable[
    [Mapping[str, Float[Array, "B C V"]]], Mapping[str, Float[Array, "B C"]]
  ]
  slots: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
  """Runs the models of a step over completions; hashable and stateless.

  Attributes:
    student: the trained model.
    teacher: the frozen teacher, if there is one.
    other_teachers: more of them, for the rows of some data sources.
    routes: with other teachers, by data source: whose its rows are, as an
      index into (teacher, *other_teachers).
    reference: the frozen reference, if there is one.
    vocab_size: ids shared by all models and the tokenizer. Columns beyond are
      masked in every model before the softmax.
    temperature: divides the logits of every model.
    chunk_tokens: tokens, per shard of the batch and of the sequence, whose
      distributions exist at the same time.
  """

  student: Model
  teacher: Model | None = None
  other_teachers: tuple[Model, ...] = ()
  routes: tuple[int, ...] = ()
  reference: Model | None = None
  vocab_size: int
  temperature: float = 1.0
  chunk_tokens: int = 256

  def model(self, role: str) -> Model:
    """The model behind a role; of several teachers the first."""
    model = getattr(self, _PLAYER[role])
    if model is None:
      raise ValueError(f"this run has no {role}")
    return model

  def models(self, role: str) -> tuple[Model, ...]:
    """The model behind a role, or all teachers."""
    others = self.other_teachers if role == "teacher" else ()
    return (self.model(role), *others)

  def in_shard(self, name: str) -> "Scorer":
    """The scorer of one shard, under a map over the shards.

    Args:
      name: logical name of the dimension that the shards cut.
    """

    def inside(model: Model) -> Model:
      return dataclasses.replace(model, layout=model.layout.in_shard(name))

    return dataclasses.replace(
      self,
      student=inside(self.student),
      teacher=self.teacher and inside(self.teacher),
      other_teachers=tuple(map(inside, self.other_teachers)),
      reference=self.reference and inside(self.reference),
    )

  def hidden(self, role: str, params: Weights, batch: ScoringBatch) -> States:
    """The states that predict each completion token; 0 where no loss is."""
    prompts = batch.prompts
    if role == "student_privileged":
      if batch.privileged is None:
        raise ValueError("this batch has no privileged prompts")
      prompts = batch.privileged
    elif role == "teacher" and batch.teacher_prompts is not None:
      prompts = batch.teacher_prompts
    if batch.packing is None:
      tokens, positions = sequences.join(prompts, batch.tokens, batch.lengths)
      segments = None
    else:
      tokens = jnp.concatenate([prompts.tokens, batch.tokens], axis=1)
      positions, segments = batch.packing.positions, batch.packing.segments
    first = prompts.tokens.shape[1] - 1

    def of_model(model: Model, params: Params) -> Float[Array, "B T D"]:
      states = model.hidden(params, tokens, positions, segments)
      states = states[:, first : first + batch.tokens.shape[1]]
      return jnp.where(batch.loss_mask[:, :, None], states, 0)

    with jax.named_scope(role):
      return self._each(role, of_model, params)

  def head(self, role: str, params: Weights) -> Weights:
    """The weights of a role's vocabulary head, gathered for a loop over T.

    Spread over the vocabulary alone: a loop over chunks would gather them from
    the other axes again for every chunk.
    """

    def of_model(model: Model, params: Params) -> Params:
      return jax.tree.map(
        lambda leaf: model.layout.constrain(leaf, ("vocab", None)),
        model.split_head(params)[1],
      )

    return self._each(role, of_model, params)

  def chunks(self, batch: ScoringBatch, slots: int | None = None) -> Chunks:
    """How a loop over T cuts the arrays of these rows.

    Args:
      batch: the rows.
      slots: the most of a row that a chunk may have; None for all.
    """
    rows, length = batch.tokens.shape
    layout, tokens = self.student.layout, self.chunk_tokens
    return Chunks.of(layout, rows, length, tokens, slots or length)

  def _each(self, role: str, function: Callable, *parts: Any) -> Any:
    """A function of the model of a role, or of each of several teachers."""
    models = self.models(role)
    if len(models) == 1:
      return function(models[0], *parts)
    return tuple(map(function, models, *parts))

  def fields(
    self,
    needs: Needs,
    hidden: Mapping[str, States],
    heads: Mapping[str, Weights],
    batch: ScoringBatch,
    measure: Measure | None = None,
  ) -> Found:
    """Scores [B, T] of the roles in `hidden`, without gradient.

    Whole distributions are left out: only what `measure` makes of them is kept.
    """
    chunks = self.chunks(batch, measure.slots if measure else None)
    wide = measure.roles if measure else ()
    requests = {
      role: dataclasses.replace(
        getattr(needs, role), vocab_logprobs=role in wide
      )
      for role in hidden
    }

    def body(_: None, part: Any) -> Any:
      states, tokens, mask = part
      pairs = {
        role: self._score(
          role,
          requests[role],
          heads[role],
          states[role],
          tokens,
          mask,
          batch.sources,
        )
        for role in hidden
      }
      measures = {}
      if measure is not None:
        found = measure.of(
          {role: pairs[role][0].vocab_logprobs for role in wide}
        )
        measures = {
          name: jnp.where(mask, values, 0.0) for name, values in found.items()
        }
      return None, Found(
        fields={
          role: dataclasses.replace(pair[0], vocab_logprobs=ABSENT)
          for role, pair in pairs.items()
        },
        observed={role: pair[1] for role, pair in pairs.items()},
        measures=measures,
      )

    parts = chunks.cut((dict(hidden), batch.tokens, batch.loss_mask))
    _, found = jax.lax.scan(body, None, parts)
    return jax.lax.stop_gradient(chunks.join(found))

  def first_pass(
    self,
    needs: Needs,
    parameters: Parameters,
    batch: ScoringBatch,
    states: Mapping[str, States] | None = None,
    measure: Measure | None = None,
  ) -> Found:
    """What must be known of some rows before the gradient.

    Args:
      needs: scores to find.
      parameters: of the models.
      batch: the rows.
      states: hidden states that exist already, by role.
      measure: what else to find.
    """
    states = dict(states or {})
    roles = [
      role
      for role in ROLES
      if role in needs.roles() or (measure and role in measure.roles)
    ]
    for role in roles:
      if role not in states:
        states[role] = self.hidden(role, parameters.of(role), batch)
    return self.fields(
      needs,
      {role: states[role] for role in roles},
      {role: self.head(role, parameters.of(role)) for role in roles},
      batch,
      measure,
    )

  def _score(
    self,
    role: str,
    request: Request,
    head: Weights,
    states: States,
    tokens: Int[Array, "B C"],
    mask: Bool[Array, "B C"],
    sources: Int[Array, " B"] | None,
  ) -> tuple[ModelScores, dict[str, Float[Array, "B C"]]]:
    """One model's scores of a chunk, as requested, and what the log sees."""
    found = self._each(role, self._distribution, head, states)
    if len(self.models(role)) > 1:
      found = self._routed(found, sources)
    logprobs, masked_mass = found
    columns = jnp.arange(logprobs.shape[-1], dtype=tokens.dtype)
    drawn = columns == tokens[:, :, None]
    token_logprobs = jnp.where(
      mask, jnp.sum(jnp.where(drawn, logprobs, 0.0), axis=-1), 0.0
    )
    entropy_source = (
      logprobs if request.entropy_gradient else jax.lax.stop_gradient(logprobs)
    )
    entropy = jnp.where(mask, divergences.entropy(entropy_source), 0.0)
    scores = ModelScores(
      logprobs=token_logprobs if request.logprobs else ABSENT,
      entropy=entropy if request.entropy else ABSENT,
      vocab_logprobs=logprobs if request.vocab_logprobs else ABSENT,
    )
    observed = {"logprobs": token_logprobs, "entropy": entropy}
    if masked_mass is not None:
      observed["masked_mass"] = jnp.where(mask, masked_mass, 0.0)
    return scores, jax.lax.stop_gradient(observed)

  def _routed(
    self, found: Sequence[_Distribution], sources: Int[Array, " B"] | None
  ) -> _Distribution:
    """Of the distributions of all teachers, that of each row's own."""
    if sources is None:
      raise ValueError("this batch does not say what its rows' teachers are")
    teacher = jnp.array(self.routes, jnp.int32)[sources]

    def own(parts: Sequence[Float[Array, "B C *V"]]) -> Float[Array, "B C *V"]:
      chosen = parts[0]
      for index, part in enumerate(parts[1:], start=1):
        rows = (teacher == index).reshape(-1, *[1] * (part.ndim - 1))
        chosen = jnp.where(rows, part, chosen)
      return chosen

    logprobs, masses = zip(*found, strict=True)
    if all(mass is None for mass in masses):
      return own(logprobs), None
    # A teacher without ids of its own has no mass on them.
    none = jnp.zeros(logprobs[0].shape[:-1], jnp.float32)
    return own(logprobs), own(
      [none if mass is None else mass for mass in masses]
    )

  def _distribution(
    self, model: Model, head: Params, states: Float[Array, "B C D"]
  ) -> _Distribution:
    """Log-softmax over the shared ids, and the mass that lay outside them."""
    logits = model.logits(head, states) / self.temperature
    width = min(
      player.config.padded_vocab_size
      for player in (
        self.student,
        self.teacher,
        *self.other_teachers,
        self.reference,
      )
      if player is not None
    )
    shared = logits[..., :width]
    valid = jnp.arange(width) < self.vocab_size
    normalizer = jax.nn.logsumexp(
      jnp.where(valid, shared, MASKED_LOGPROB), axis=-1, keepdims=True
    )
    logprobs = jnp.where(valid, shared - normalizer, MASKED_LOGPROB)
    if model.config.vocab_size <= self.vocab_size:
      return logprobs, None
    whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return logprobs, -jnp.expm1(normalizer - whole)[..., 0]


def bundle_scores(
  batch: ScoringBatch, scores: Mapping[str, ModelScores], needs: Needs
) -> Scores:
  """The objective's view of some tokens; absent roles hold no field."""
  start = ABSENT
  if needs.start:
    start = batch.start_logprobs
    if start is None:
      start = jax.lax.stop_gradient(scores["student"].logprobs)
  return Scores(
    tokens=batch.tokens,
    sampled_mask=batch.sampled_mask,
    loss_mask=batch.loss_mask,
    behavior_valid=batch.behavior_valid,
    behavior_logprobs=jnp.where(batch.loss_mask, batch.behavior_logprobs, 0.0),
    group=batch.group,
    start_logprobs=start,
    rewards=batch.rewards if batch.rewards is not None else ABSENT,
    **{role: scores.get(role, ModelScores()) for role in ROLES},
  )
