"""The value and gradient of an objective on some rows of a global batch.

One forward pass of the trunk per student view is differentiated as a whole. The
vocabulary heads run over chunks of T, and each chunk is differentiated where it
stands: the loop yields the gradient in the hidden states and sums the one in
the head's weights; then one backward pass of the trunk finishes. So no
[B, T, V] array exists and no product of the head is computed twice. Where
adapters are trained, the head has no gradient.

Where a selector chooses the tokens that carry loss, a first pass over the heads
ranks all of them, without gradient; the loop then runs over rows of the chosen
tokens alone, [B, K] in place of [B, T].
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opd_jax.objectives import reduce
from opd_jax.objectives.base import Needs, Objective, Signals, Terms
from opd_jax.scoring import (
  Found,
  Measure,
  Observed,
  Parameters,
  Scorer,
  States,
  Weights,
  bundle_scores,
)
from opd_jax.selector import Kept, Selector
from opd_jax.types import ModelScores, Params, ScoringBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """An objective's value and gradient on some rows of a global batch.

  Attributes:
    losses: what the rows add to each reduced term; the loss is their sum.
    statistics: what they add to each reduced statistic.
    gradients: what they add to the gradient in what is trained.
    observed: per token, for the log; chosen or not. With a selector, of the
      models that it looks at.
    selected: "kept", whether a token is chosen, and its "score"; {} without a
      selector.
  """

  losses: Mapping[str, Float[Array, ""]]
  statistics: Mapping[str, Float[Array, ""]]
  gradients: Params
  observed: Observed
  selected: Mapping[str, Float[Array, "B T"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """What some rows must know of the global batch before their gradient.

  Attributes:
    loss_mask: tokens that carry loss; with a selector, the chosen ones.
    counts: of the global batch's, and of the rows'.
    signals: of the objective, for the rows.
    selected: see `Evaluation`.
  """

  loss_mask: Bool[Array, "B T"]
  counts: reduce.Counts
  signals: Signals
  selected: Mapping[str, Float[Array, "B T"]]

  def by_row(self) -> Any:
    """The part of it that rows have each for themselves, [B, ...] arrays."""
    return (
      self.loss_mask,
      self.counts.tokens_in_row,
      dict(self.signals.token),
      dict(self.signals.row),
      dict(self.selected),
    )

  def with_rows(self, by_row: Any) -> "Prepared":
    """The same for other rows, given as `by_row` gives them."""
    loss_mask, tokens_in_row, token, row, selected = by_row
    return Prepared(
      loss_mask=loss_mask,
      counts=dataclasses.replace(self.counts, tokens_in_row=tokens_in_row),
      signals=dataclasses.replace(self.signals, token=token, row=row),
      selected=selected,
    )


def first_pass(
  scorer: Scorer,
  objective: Objective,
  selector: Selector | None,
  parameters: Parameters,
  batch: ScoringBatch,
  states: Mapping[str, Float[Array, "B T D"]] | None = None,
) -> Found:
  """What `prepare` of the objective and the selector read of some rows.

  Args:
    scorer: runs the models.
    objective: what is descended.
    selector: chooses the tokens that carry loss; None for all.
    parameters: of the models.
    batch: the rows.
    states: hidden states that exist already, by role.
  """
  measure = None
  if selector is not None:
    measure = Measure(
      roles=selector.roles,
      of=selector.measure,
      slots=selector.capacity(batch.tokens.shape[1]),
    )
  needs = _first_needs(objective, selector)
  return scorer.first_pass(needs, parameters, batch, states, measure)


def _first_needs(objective: Objective, selector: Selector | None) -> Needs:
  if selector is None:
    return objective.prepare_needs
  return selector.needs(objective)


def evaluate(
  scorer: Scorer,
  objective: Objective,
  selector: Selector | None,
  parameters: Parameters,
  batch: ScoringBatch,
  prepare: Callable[[Found], Prepared],
  found: Found | None = None,
) -> Evaluation:
  """Value and gradient of an objective on some rows.

  Args:
    scorer: runs the models.
    objective: what to descend.
    selector: chooses the tokens that carry loss; None for all.
    parameters: of the models; the gradient is in the student's.
    batch: rows of a global batch.
    prepare: what these rows must know, from the result of `first_pass`.
    found: that result, if an earlier pass over the global batch made it;
      None makes it from the states of this pass.
  """
  needs = _first_needs(objective, selector)
  head, fixed_head = scorer.head("student", parameters.of("student")), {}
  if parameters.base is None:
    trunk, _ = scorer.student.split_head(parameters.student)
  else:  # No adapter is in the head.
    trunk = parameters.student
    head, fixed_head = fixed_head, head
  trained_roles = objective.needs.gradient_roles()

  def run(trunk: Params) -> dict[str, States]:
    weights = parameters.with_student(trunk).of("student")
    return {role: scorer.hidden(role, weights, batch) for role in trained_roles}

  trained, backward = jax.vjp(run, trunk)
  states = jax.lax.stop_gradient(trained)
  later = [role for role in objective.needs.roles() if role not in states]
  if found is None:
    for role in (*needs.roles(), *later):
      if role not in states:
        states[role] = scorer.hidden(role, parameters.of(role), batch)
    found = first_pass(scorer, objective, selector, parameters, batch, states)
  known = {
    role: found.fields[role]
    for role in later
    if role in found.fields and needs.covers(objective.needs, role)
  }
  fixed = {
    role: states[role]
    if role in states
    else scorer.hidden(role, parameters.of(role), batch)
    for role in later
    if role not in known
  }
  prepared = prepare(found)
  fixed_heads = {role: scorer.head(role, parameters.of(role)) for role in fixed}
  shards = RowShards.of(scorer, batch)

  def run_shard(rows: Any) -> Any:
    by_row, batch, known, fixed, trained = rows
    part = prepared.with_rows(by_row)
    signals, kept = part.signals, None
    if selector is not None:
      batch = dataclasses.replace(batch, loss_mask=part.loss_mask)
      length = batch.tokens.shape[1]
      kept = Kept(part.loss_mask, selector.capacity(length))
      batch = dataclasses.replace(batch, **kept.gather(_token_fields(batch)))
      signals = dataclasses.replace(signals, token=kept.gather(signals.token))
      known, fixed, trained = kept.gather((known, fixed, trained))
    loop = _GradientLoop(
      scorer=shards.scorer,
      objective=objective,
      batch=batch,
      counts=part.counts,
      signals=signals,
      known=known,
      fixed=fixed,
      fixed_heads=fixed_heads,
      fixed_head=fixed_head,
    )
    run = loop.whole_rows if objective.needs.whole_rows else loop.pointwise
    summed, seen, in_states = run(trained, head)
    if kept is None:
      return summed, seen, in_states
    # Of the chosen tokens alone, which says little about the others.
    return summed, {}, kept.scatter(in_states)

  summed, seen, in_states = shards.map(
    run_shard, (prepared.by_row(), batch, known, fixed, trained)
  )
  losses, statistics, in_head = summed
  (in_trunk,) = backward(in_states)
  return Evaluation(
    losses=losses,
    statistics=statistics,
    gradients=add_trees(in_trunk, in_head),
    observed={**found.observed, **seen},
    selected=prepared.selected,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShards:
  """Rows as the shards of the batch, each of which runs a loop of its own.

  The gradients that shards give a weight they share are then summed once,
  behind the loops. In one loop over the rows of all shards every turn would
  reduce its part of the gradient over the devices.

  Attributes:
    scorer: of the rows of one shard.
    count: shards.
    axes: of the mesh, that the shards lie on.
  """

  scorer: Scorer
  count: int
  axes: tuple[str, ...]

  @classmethod
  def of(cls, scorer: Scorer, batch: ScoringBatch) -> "RowShards":
    """The shards of a batch; one, if the mesh does not divide its rows."""
    layout = scorer.student.layout
    count = layout.shards("batch")
    if count == 1 or batch.tokens.shape[0] % count:
      return cls(scorer=scorer, count=1, axes=())
    return cls(
      scorer=scorer.in_shard("batch"),
      count=count,
      axes=layout.mesh_axes("batch"),
    )

  def map(self, function: Callable[[Any], Any], rows: Any) -> Any:
    """Applies a function to each shard's rows.

    Args:
      function: of a tree of [B / shards, ...] arrays; returns what is to be
        summed over the shards, and two trees of arrays by row.
      rows: a tree of [B, ...] arrays.

    Returns:
      The sum, and the two trees by row.
    """
    if self.count == 1:
      return function(rows)

    def cut(leaf: Array) -> Array:
      return leaf.reshape(self.count, -1, *leaf.shape[1:])

    def join(leaf: Array) -> Array:
      return leaf.reshape(-1, *leaf.shape[2:])

    mapped = jax.vmap(function, spmd_axis_name=self.axes)
    summed, *by_row = mapped(jax.tree.map(cut, rows))
    summed = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), summed)
    return (summed, *jax.tree.map(join, by_row))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GradientLoop:
  """The loop over chunks that differentiates an objective.

  Of the student's head it is given what is trained, all of it or nothing;
  `fixed_head` is the rest.
  """

  scorer: Scorer
  objective: Objective
  batch: ScoringBatch
  counts: reduce.Counts
  signals: Signals
  known: Mapping[str, ModelScores]
  fixed: Mapping[str, States]
  fixed_heads: Mapping[str, Weights]
  fixed_head: Params

  def pointwise(self, trained: Any, head: Params) -> Any:
    """Terms of each chunk, differentiated where it stands."""

    def chunk_loss(states: Any, head: Params, part: Any) -> Any:
      scores, observed = self._chunk_scores(states, head, part)
      signals = dataclasses.replace(self.signals, token=part["signals"])
      bundle = bundle_scores(
        part["batch"], {**part["known"], **scores}, self.objective.needs
      )
      loss, losses, statistics = self._reduce(
        *self.objective.terms(bundle, signals), bundle.loss_mask
      )
      return loss, ((losses, statistics), observed)

    (sums, observed), (in_states, in_head) = self._differentiate(
      chunk_loss, trained, head
    )
    losses, statistics = jax.tree.map(jnp.sum, sums)
    return (losses, statistics, in_head), observed, in_states

  def whole_rows(self, trained: Any, head: Params) -> Any:
    """Terms of whole rows: their gradient in the fields comes first."""
    needs = self.objective.needs
    own = {**self.fixed_head, **head}
    heads = {**self.fixed_heads, **dict.fromkeys(trained, own)}
    found = self.scorer.fields(
      needs, {**self.fixed, **trained}, heads, self.batch
    )
    fields = found.fields
    others = {role: fields[role] for role in self.fixed}

    def rows_loss(trained_fields: Mapping[str, ModelScores]) -> Any:
      bundle = bundle_scores(
        self.batch, {**self.known, **others, **trained_fields}, needs
      )
      loss, losses, statistics = self._reduce(
        *self.objective.terms(bundle, self.signals), bundle.loss_mask
      )
      return loss, (losses, statistics)

    (_, (losses, statistics)), slopes = jax.value_and_grad(
      rows_loss, has_aux=True
    )({role: fields[role] for role in trained})

    def chunk_loss(states: Any, head: Params, part: Any) -> Any:
      scores, observed = self._chunk_scores(states, head, part)
      products = jax.tree.map(
        lambda slope, field: jnp.sum(slope * field),
        part["slopes"],
        {role: scores[role] for role in part["slopes"]},
      )
      return sum(jax.tree.leaves(products)), ((), observed)

    (_, observed), (in_states, in_head) = self._differentiate(
      chunk_loss, trained, head, slopes=slopes
    )
    return (losses, statistics, in_head), observed, in_states

  def _chunk_scores(self, states: Any, head: Params, part: Any) -> Any:
    """Scores of all roles that are run on a chunk, and what the log sees."""
    scorer = self.scorer.in_shard("sequence")
    scores, observed = {}, {}
    own = {**self.fixed_head, **head}
    for role, chunk in {**part["fixed"], **states}.items():
      scores[role], observed[role] = scorer._score(
        role,
        getattr(self.objective.needs, role),
        own if role in states else self.fixed_heads[role],
        chunk,
        part["batch"].tokens,
        part["batch"].loss_mask,
        part["batch"].sources,
      )
    return scores, observed

  def _reduce(
    self, terms: Terms, statistics: Terms, mask: Bool[Array, "B C"]
  ) -> Any:
    def total(name: str, term: Any) -> Float[Array, ""]:
      if term.loss.ndim == 1 and not self.objective.needs.whole_rows:
        raise ValueError(
          f"term {name!r} of {self.objective.name} has shape [B], which needs "
          "whole_rows=True: without it terms are computed by chunks of T"
        )
      return reduce.partial_sum(term, mask, self.counts, self.signals)

    losses = {name: total(name, term) for name, term in terms.items()}
    means = {name: total(name, term) for name, term in statistics.items()}
    return sum(losses.values()), losses, jax.lax.stop_gradient(means)

  def _differentiate(
    self, chunk_loss: Any, trained: Any, head: Params, **extra: Any
  ) -> Any:
    """Scans `chunk_loss`; gradients in the trained states and in the head."""
    chunks = self.scorer.chunks(self.batch)
    by_token = chunks.cut(
      {
        "trained": trained,
        "fixed": dict(self.fixed),
        "known": dict(self.known),
        "signals": dict(self.signals.token),
        "batch": _token_fields(self.batch),
        **extra,
      }
    )

    def gradient(part: Any) -> Any:
      part = dict(part)
      part["batch"] = dataclasses.replace(self.batch, **part["batch"])
      states = part.pop("trained")
      (_, aux), slopes = jax.value_and_grad(
        chunk_loss, argnums=(0, 1), has_aux=True
      )(states, head, part)
      return aux, slopes

    def by_parts(part: Any) -> Any:
      mapped = jax.vmap(
        gradient,
        spmd_axis_name=self.scorer.student.layout.mesh_axes("sequence"),
      )
      (sums, observed), (in_states, in_head) = mapped(chunks.apart(part))
      observed, in_states = chunks.together((observed, in_states))
      return (sums, observed), (in_states, in_head)

    # Heads' gradients of the parts of T are summed once, behind the loop.
    lead = () if chunks.parts == 1 else (chunks.parts,)

    def body(head_gradient: Params, part: Any) -> Any:
      run = by_parts if lead else gradient
      aux, (in_states, in_head) = run(part)
      in_head = jax.tree.map(
        lambda total, part: total + part.astype(jnp.float32),
        head_gradient,
        in_head,
      )
      return in_head, (in_states, aux)

    zero = jax.tree.map(
      lambda leaf: jnp.zeros((*lead, *leaf.shape), jnp.float32), head
    )
    in_head, (in_states, (sums, observed)) = jax.lax.scan(body, zero, by_token)
    if lead:
      in_head = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), in_head)
    return (sums, chunks.join(observed)), (chunks.join(in_states), in_head)


def add_trees(left: Params, right: Params) -> Params:
  """Sum of two nested dicts; a key in one of them only is kept as it is."""
  total = dict(left)
  for key, value in right.items():
    if key not in total:
      total[key] = value
    elif isinstance(value, Mapping):
      total[key] = add_trees(total[key], value)
    else:
      total[key] = total[key] + value
  return total


def _token_fields(batch: ScoringBatch) -> dict[str, Array | None]:
  names = (
    "tokens",
    "sampled_mask",
    "loss_mask",
    "behavior_valid",
    "behavior_logprobs",
    "start_logprobs",
  )
  return {name: getattr(batch, name) for name in names}
