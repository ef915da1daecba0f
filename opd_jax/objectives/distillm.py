"""Skewed KL along completions: the loss of DistiLLM.

  skew_forward_kl  KL(teacher || alpha teacher + (1 - alpha) student)
  skew_reverse_kl  KL(student || alpha student + (1 - alpha) teacher)

per position, over the whole vocabulary. The mixture bounds both by -log alpha,
and the slope where the models disagree with them. As in `gkd`, no gradient
flows through the sampling.

Descends: KL(teacher || alpha teacher + (1 - alpha) student) by default, the
skewed reverse KL as an option.

Off policy: nothing to correct, the tokens are data.

Use it when: forward KL is wanted and the student still gives next to nothing to
tokens that the teacher likes, where plain forward KL has no bound. Near
agreement it is (1 - alpha)^2 times the plain KL, and `gkd` with beta = 0 serves
as well. It costs what `gkd` costs.

Source: Ko et al., arXiv 2402.03898; alpha 0.1 and the forward form as in the
official script for GPT-2 (`--type adaptive-sfkl`).

The paper mixes fixed data, fresh samples and a replay buffer by a threshold
that follows the validation loss: `rollout.replay_capacity` and the keys beside
it do that, see `replay`. Without them every completion is fresh.

Differs: the fixed data are completions of the teacher in a store, and the
validation loss is the run's held-out loss. The official code leaves out the
teacher's entropy of the forward form, which changes the value and not the
gradient.
"""

import dataclasses
from typing import Literal

from opd_jax.objectives import reduce
from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.objectives.divergences import Divergence
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    divergence: the skewed KL; official script: the forward one.
    alpha: weight in the mixture of the distribution that is compared with it,
      in [0, 1); 0 is the plain KL. Official code: 0.1.
    reduction: see `reduce.row_scale`; official code: this one.
  """

  divergence: Literal["skew_forward_kl", "skew_reverse_kl"] = "skew_forward_kl"
  alpha: float = 0.1
  reduction: str = "token_mean"

  def __post_init__(self):
    _divergence(self)
    reduce.check(self.reduction)


def _divergence(config: Config) -> Divergence:
  return Divergence(name=config.divergence, alpha=config.alpha)


def needs(config: Config) -> Needs:
  """Whole next-token distributions of both models."""
  return Needs(
    student=Request(vocab_logprobs=True),
    teacher=Request(vocab_logprobs=True),
    given="may",
    replayed=True,
  )


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """The skewed KL, nats per completion token."""
  loss = _divergence(config)(
    scores.student.vocab_logprobs, scores.teacher.vocab_logprobs
  )
  return {"divergence": Term(loss, config.reduction)}, {}
