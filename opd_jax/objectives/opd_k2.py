"""Sampled-token reverse KL as a loss that is differentiated directly.

With s and t the log-probabilities of student and teacher of the drawn token:

  loss_t = (s_t - t_t)^2 / 2          nats^2 per token; gradient
                                      (s_t - t_t) grad s_t

Over the drawn token the expected gradient is that of KL(student || teacher) at
every prefix the student reaches, as for `opd_k1` on policy with discount 0. The
effect of a token on later prefixes is left out, and the value is not a KL:
estimator="k3+" has the same gradient and the k3 estimate as its value.

There is no ratio: it is right for tokens drawn from the student's whole
distribution as it is, and a run with a sampling filter, with a teacher that
draws too, or with several updates per rollout batch is refused. Where the
behavior differs, the expected gradient is sum_v behavior_v (s_v - t_v) grad
s_v, which is that of no divergence: take `opd_k1`.

Descends: KL(student || teacher).

Off policy: no correction; sampling filters are refused.

Use it when: code that differentiates a loss on drawn tokens is to be compared
with: token by token its gradient is that of `opd_k1` on policy, and its cost
too. Prefer `opd_k1` otherwise: it corrects for a teacher that draws and for
several updates, and its loss has the unit of a KL.

Source: k2 of Schulman, "Approximating KL divergence" (2020); as a loss, the
direct form of verl's distillation losses.

Differs: verl's default is k3 differentiated directly, whose expected gradient
is that of KL(teacher || student). It is refused, as k1 is, whose expected
gradient is 0; see `estimators`.
"""

import dataclasses

from opd_jax.objectives import estimators, reduce
from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    estimator: "k2", or "k3+" for the value of k3 with the gradient of k2; k1
      and k3 are refused as losses. verl: k3.
    reduction: see `reduce.row_scale`; verl: this one.
  """

  estimator: str = "k2"
  reduction: str = "token_mean"

  def __post_init__(self):
    estimators.check_loss(self.estimator)
    reduce.check(self.reduction)


def needs(config: Config) -> Needs:
  """Log-probabilities of the drawn tokens under both models."""
  return Needs(
    student=Request(logprobs=True),
    teacher=Request(logprobs=True),
    pure_sampling=True,
    single_update=True,
  )


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """The estimate of each drawn token."""
  student, teacher = scores.student.logprobs, scores.teacher.logprobs
  loss = estimators.loss(config.estimator, student, teacher)
  return (
    {"divergence": Term(loss, config.reduction)},
    {"k1": Term(estimators.k1(student, teacher))},
  )
