"""Full-vocabulary divergence on the student's own completions (GKD).

  loss_t = JSD_beta(student, teacher)      beta = 0: KL(teacher || student)
                                           beta = 1: KL(student || teacher)

per position, over the whole vocabulary; see `divergences.generalized_jsd`. The
drawn tokens are data: no gradient flows through the sampling, which is what
separates GKD from MiniLLM.

Source: Agarwal et al., arXiv 2306.13649, Eq. 1. The temperature is the run's
sampling temperature, applied to both models, without the factor temperature^2.

Differs: the mean runs over all tokens of the batch (as in TRL);
reduction="seq_mean_token_mean" is the paper's mean per sequence.
"""

import dataclasses

from opd_jax.errors import InputError
from opd_jax.objectives import divergences, reduce
from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    beta: weight of the teacher in the mixture, in [0, 1]; 0 is forward KL, 1
      is reverse KL.
    reduction: see `reduce.row_scale`.
  """

  beta: float = 1.0
  reduction: str = "token_mean"

  def __post_init__(self):
    if not 0 <= self.beta <= 1:
      raise InputError(f"beta must be in [0, 1], got {self.beta}")
    reduce.check(self.reduction)


def needs(config: Config) -> Needs:
  """Whole next-token distributions of both models."""
  return Needs(
    student=Request(vocab_logprobs=True), teacher=Request(vocab_logprobs=True)
  )


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """The divergence, nats per completion token."""
  loss = divergences.generalized_jsd(
    scores.student.vocab_logprobs, scores.teacher.vocab_logprobs, config.beta
  )
  return {"divergence": Term(loss, config.reduction)}, {}
