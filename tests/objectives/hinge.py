"""A toy objective in one file: raise tokens until the teacher is matched.

With s, t the log-probabilities of student and teacher of the drawn token:

  loss_t = weight * max(0, t + margin - s)

No method of the field; `tests/new_objective_test.py` trains with it.
"""

import dataclasses

import jax.numpy as jnp

from opd_jax.errors import InputError
from opd_jax.objectives import reduce
from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    margin: nats above the teacher's log-probability.
    weight: multiplies the loss, > 0.
    reduction: see `reduce.row_scale`.
  """

  margin: float = 0.0
  weight: float = 1.0
  reduction: str = "token_mean"

  def __post_init__(self):
    if not self.weight > 0:
      raise InputError(f"weight must be > 0, got {self.weight}")
    reduce.check(self.reduction)


def needs(config: Config) -> Needs:
  """Log-probabilities of the drawn tokens under both models."""
  return Needs(student=Request(logprobs=True), teacher=Request(logprobs=True))


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """What is missing, nats per token."""
  missing = scores.teacher.logprobs + config.margin - scores.student.logprobs
  loss = config.weight * jnp.maximum(0.0, missing)
  return {"hinge": Term(loss, config.reduction)}, {"missing": Term(missing)}
