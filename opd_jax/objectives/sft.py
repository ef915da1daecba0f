"""Maximum likelihood of given tokens: supervised fine-tuning.

  loss_t = -log student(token_t)

The mean runs over all tokens of the batch that carry loss, which are given, not
drawn: `opd-jax sft` reads them from a file. No model but the student is run.

It is no choice for `train`. On the student's own samples the expected gradient
is 0, E[grad log student(token)] = 0, so that a run would only add noise to the
weights.

Descends: KL(data || student), up to the entropy of the data.

Off policy: nothing to correct, the tokens are given.

Use it when: a student must first learn a format, a language or a task, or as
the control of distillation: the same number of the teacher's solutions as data.
It runs one model and draws nothing. The student never sees its own mistakes,
which is what the other objectives are for.

Source: maximum likelihood, the textbook loss of language models.
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
