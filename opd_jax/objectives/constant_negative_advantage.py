"""A control: every drawn token is pushed down alike, whatever a teacher says.

  loss_t = -exp(s_t - sg(b_t)) * (-coefficient)

with s, b the log-probabilities of student and behavior of the drawn token. The
loss value is the coefficient, its gradient REINFORCE with a constant reward.
Its expectation is 0 for reduction="sum" and wherever all rows are equally
long: what a run still gains, it gains from the noise of the draws, from the
optimizer, or from row lengths (a mean over a batch's tokens divides by lengths
that were drawn too, which favours long rows, since their tokens are pushed
down less). An objective that does no better has learnt nothing from its
teacher.

Descends: nothing: the expected gradient is 0, but for row lengths.

Off policy: a ratio without clips.

Use it when: a comparison must show how much of a gain needs a teacher at all.
Run it beside an objective on drawn tokens with the same seeds and steps. It is
the cheapest, since no teacher is run. Never use it to train a student.

Source: the comparison of arXiv 2608.31046, where a constant negative advantage
matched a teacher's.
"""

import dataclasses
import math

import jax.numpy as jnp

from opd_jax.errors import InputError
from opd_jax.objectives import policy, reduce
from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    coefficient: size of the negative advantage, nats, > 0; 1 is our choice.
    reduction: see `reduce.row_scale`.
  """

  coefficient: float = 1.0
  reduction: str = "token_mean"

  def __post_init__(self):
    if not (self.coefficient > 0 and math.isfinite(self.coefficient)):
      raise InputError(
        f"coefficient must be > 0 and finite, got {self.coefficient}"
      )
    reduce.check(self.reduction)


def needs(config: Config) -> Needs:
  """Log-probabilities of the drawn tokens under the student alone."""
  return Needs(student=Request(logprobs=True))


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """Constant times the ratio, nats per completion token."""
  ratio = policy.ratio(scores)
  advantage = jnp.full_like(ratio, -config.coefficient)
  loss = policy.surrogate(ratio, advantage)
  return {"policy": Term(loss, config.reduction)}, {"ratio": Term(ratio)}
