"""Maximum likelihood of given tokens: supervised fine-tuning.

  loss_t = -log student(token_t)

The mean runs over all tokens of the batch that carry loss, which are given, not
drawn: `opd-jax sft` reads them from a file. No model but the student is run.

It is no choice for `train`. On the student's own samples the expected gradient
is 0, E[grad log student(token)] = 0, so that a run would only add noise to the
weights.
"""

import dataclasses

from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """It has no options."""


def needs(config: Config) -> Needs:
  """The student's log-probability of each token."""
  return Needs(student=Request(logprobs=True))


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """Negative log-likelihood, nats per token."""
  return {"nll": Term(-scores.student.logprobs)}, {}
