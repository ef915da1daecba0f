"""What an objective is: a few pure functions on arrays, and what they need.

A module in this folder is an objective if it has

  Config                                a frozen dataclass of its options
  needs(config) -> Needs                what `terms` reads
  terms(config, scores, signals) -> (terms, statistics)

and, where the method calls for it,

  prepare_needs(config) -> Needs        what `prepare` reads; default: masks,
                                        tokens and behavior logprobs only
  prepare(config, scores, state, schedule) -> Signals
  check_vocabulary(config, vocab_size)  raises InputError for options that the
                                        ids shared by all models do not allow
  init_state(config) -> {name: array}   carried across steps, checkpointed
  update_state(config, state, statistics) -> state

`terms` is pointwise in (B, T): the engine calls it by micro-batch and by chunk
of T, and the result must not depend on how. What looks across tokens, rows or
the batch (quantiles, group statistics, the size of a selection) is `prepare`,
which sees the whole global batch, without gradient. A method whose loss needs
whole rows says `whole_rows` and may then return terms of shape [B].

If `prepare` reads the student, it costs an extra pass over the vocabulary head
with one micro-batch, and an extra forward of the student with several.

The docstring of the module becomes a page of docs/objectives/: a line on what
it is, the formula, then paragraphs that begin with these words. All but the
last must be there.

  Descends:     the quantity, with its direction: KL(student || teacher)
  Off policy:   what corrects for tokens of another distribution than the
                student's own; its first sentence goes into a table
  Use it when:  what it is good for, what it costs, what to prefer otherwise
  Source:       paper, equations, arXiv id; code that was followed
  Differs:      where papers and their code disagree with this or each other

The `Attributes:` of `Config` say where each default comes from.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int, Key

from opd_jax.errors import InputError
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is asked of one model about the completion.

  Attributes:
    logprobs: of the completion tokens.
    entropy: of the next-token distributions.
    vocab_logprobs: the whole distributions, a chunk of T at a time.
    gradient: for a student, whether its parameters receive a gradient from
      what is asked here.
    entropy_gradient: whether that includes the entropy.
  """

  logprobs: bool = False
  entropy: bool = False
  vocab_logprobs: bool = False
  gradient: bool = True
  entropy_gradient: bool = False

  def __bool__(self) -> bool:
    return self.logprobs or self.entropy or self.vocab_logprobs


ROLES = ("student", "student_privileged", "teacher", "reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
  """The fields of `Scores` that are computed, and how they are handed over.

  Attributes:
    student: after the plain prompt.
    student_privileged: after the second prompt of the batch.
    teacher: the frozen teacher.
    reference: the frozen reference.
    whole_rows: hand over all of T at once; excludes `vocab_logprobs`.
    rewards: of the completions, by the verifier of the run's host stage.
    groups: completions of a prompt are compared: at least two of each.
    pure_sampling: there is no correction for how the tokens are drawn, which
      must be from the student's whole distribution, without filters.
    start: the student's log-probabilities before the first update of the step.
      They are those of the same pass if it is the only update, and come from a
      pass of their own before several.
    single_update: there is no correction for a student that has moved since it
      drew the tokens.
    given: whether completions may hold tokens that the student did not draw
      (`loss_mask & ~sampled_mask`, without a behavior): "never"; "may"; "must"
      where an option is about nothing else.
    replayed: completions may be old ones of the student, which have no
      behavior and are marked as `given` ones are.
  """

  student: Request = Request()
  student_privileged: Request = Request()
  teacher: Request = Request()
  reference: Request = Request()
  whole_rows: bool = False
  rewards: bool = False
  groups: bool = False
  pure_sampling: bool = False
  start: bool = False
  single_update: bool = False
  given: Literal["never", "may", "must"] = "never"
  replayed: bool = False

  def __post_init__(self):
    wide = [role for role in ROLES if getattr(self, role).vocab_logprobs]
    if self.whole_rows and wide:
      raise InputError(
        f"whole_rows and vocab_logprobs (of {', '.join(wide)}) exclude each "
        "other: whole distributions exist for a chunk of T at a time only"
      )

  @property
  def host(self) -> bool:
    """Whether a host stage must run between rollout and scoring."""
    return self.rewards

  def roles(self) -> tuple[str, ...]:
    """The roles something is asked of."""
    return tuple(role for role in ROLES if getattr(self, role))

  def starting_here(self) -> "Needs":
    """With `start` from the student of the same pass."""
    if not self.start:
      return self
    student = dataclasses.replace(self.student, logprobs=True)
    return dataclasses.replace(self, student=student)

  def covers(self, later: "Needs", role: str) -> bool:
    """Whether all that is needed later of a frozen role is needed here."""
    before, after = getattr(self, role), getattr(later, role)
    return (
      not after.vocab_logprobs
      and before.logprobs >= after.logprobs
      and before.entropy >= after.entropy
    )

  def gradient_roles(self) -> tuple[str, ...]:
    """The student roles that carry gradient."""
    return tuple(
      role
      for role in ("student", "student_privileged")
      if getattr(self, role) and getattr(self, role).gradient
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
  """A loss (or a statistic) before it is reduced; see `reduce.row_scale`.

  Attributes:
    loss: nats, unmasked and unreduced.
    reduction: how it becomes one number.
    normalizer: for "selection_mean", the name of its divisor in
      `Signals.normalizer`.
  """

  loss: Float[Array, "B T"] | Float[Array, " B"]
  reduction: str = dataclasses.field(
    default="token_mean", metadata={"static": True}
  )
  normalizer: str | None = dataclasses.field(
    default=None, metadata={"static": True}
  )


Terms = Mapping[str, Term]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Signals:
  """What `prepare` hands to `terms`; no gradient flows through it.

  Attributes:
    token: arrays [B, T], sliced like the scores.
    row: arrays [B].
    scalar: arrays [].
    normalizer: divisors [] of "selection_mean" terms; a selection of size 0
      has loss 0 and gradient 0.
  """

  token: Mapping[str, Float[Array, "B T"]] = dataclasses.field(
    default_factory=dict
  )
  row: Mapping[str, Float[Array, " B"]] = dataclasses.field(
    default_factory=dict
  )
  scalar: Mapping[str, Float[Array, ""]] = dataclasses.field(
    default_factory=dict
  )
  normalizer: Mapping[str, Float[Array, ""]] = dataclasses.field(
    default_factory=dict
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """Where the run is, as traced scalars: a phase switch never recompiles.

  Attributes:
    step: steps done before this one.
    progress: step / total steps, in [0, 1); the same for all updates of a step.
    key: of (seed, step, mini-batch), for what `prepare` draws; the same on
      every mesh, and in every pass over the rollout batch.
  """

  step: Int[Array, ""]
  progress: Float[Array, ""]
  key: Key[Array, ""]


State = Mapping[str, Array]


def _no_needs(config: Any) -> Needs:
  return Needs()


def _any_vocabulary(config: Any, vocab_size: int) -> None:
  pass


def _no_state(config: Any) -> State:
  return {}


def _no_signals(
  config: Any, scores: Scores, state: State, schedule: Schedule
) -> Signals:
  return Signals()


def _same_state(
  config: Any, state: State, statistics: Mapping[str, Array]
) -> State:
  return state


@dataclasses.dataclass(frozen=True)
class Objective:
  """An objective module with its parsed options, defaults filled in."""

  name: str
  config: Any
  needs: Needs
  prepare_needs: Needs
  terms_fn: Callable[..., tuple[Terms, Terms]]
  prepare_fn: Callable[..., Signals]
  init_state_fn: Callable[..., State]
  update_state_fn: Callable[..., State]
  check_vocabulary_fn: Callable[..., None]

  @classmethod
  def bind(cls, name: str, module: Any, config: Any) -> "Objective":
    """Takes the functions a module has, and the defaults for the others."""
    before = getattr(module, "prepare_needs", _no_needs)(config)
    wide = [role for role in ROLES if getattr(before, role).vocab_logprobs]
    if wide:
      raise InputError(
        f"prepare_needs of {name} asks for vocab_logprobs (of "
        f"{', '.join(wide)}): whole distributions exist for a chunk of T at a "
        "time only, in `terms`"
      )
    return cls(
      name=name,
      config=config,
      needs=module.needs(config),
      prepare_needs=before,
      terms_fn=module.terms,
      prepare_fn=getattr(module, "prepare", _no_signals),
      init_state_fn=getattr(module, "init_state", _no_state),
      update_state_fn=getattr(module, "update_state", _same_state),
      check_vocabulary_fn=getattr(module, "check_vocabulary", _any_vocabulary),
    )

  def check_vocabulary(self, vocab_size: int) -> None:
    """Raises InputError where an option does not fit the shared vocabulary."""
    try:
      self.check_vocabulary_fn(self.config, vocab_size)
    except InputError as error:
      raise InputError(f"objective {self.name}: {error}") from error

  def frozen_roles(self) -> tuple[str, ...]:
    """The frozen models that a step runs."""
    read = {*self.prepare_needs.roles(), *self.needs.roles()}
    return tuple(role for role in ("teacher", "reference") if role in read)

  def starting_here(self) -> "Objective":
    """This objective on rows whose student has not moved yet."""
    return dataclasses.replace(
      self,
      needs=self.needs.starting_here(),
      prepare_needs=self.prepare_needs.starting_here(),
    )

  def terms(self, scores: Scores, signals: Signals) -> tuple[Terms, Terms]:
    """Losses and statistics of a part of the batch, unreduced."""
    return self.terms_fn(self.config, scores, signals)

  def prepare(
    self, scores: Scores, state: State, schedule: Schedule
  ) -> Signals:
    """What `terms` must know of the whole batch."""
    signals = self.prepare_fn(self.config, scores, state, schedule)
    return jax.lax.stop_gradient(signals)

  def init_state(self) -> State:
    """The objective's arrays at step 0."""
    return self.init_state_fn(self.config)

  def update_state(
    self, state: State, statistics: Mapping[str, Float[Array, ""]]
  ) -> State:
    """The objective's arrays after an update, from its statistics."""
    return self.update_state_fn(self.config, state, statistics)
