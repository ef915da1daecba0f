"""Divergence of whole distributions along completions (GKD).

  loss_t = D(student, teacher)             at the prefix of completion token t

per position. D is `objective.divergence`, see `divergences`; by default

  jsd    beta KL(teacher || M) + (1 - beta) KL(student || M)
         with M = beta teacher + (1 - beta) student
         beta = 0: KL(teacher || student)  beta = 1: KL(student || teacher)

over all the vocabulary, or over what `objective.support` leaves of it, see
`supports`. The drawn tokens are data: no gradient flows through the sampling,
which is what separates GKD from MiniLLM. So the expected gradient is that of
the divergences at the prefixes the student reaches, without the effect of a
token on later prefixes; with several updates per rollout batch, the prefixes
that the student before them reached.

Descends: any of twelve divergences, by default KL(student || teacher).

Off policy: nothing to correct, the tokens are data.

Use it when: in doubt. Its expected gradient with beta = 1 is that of `opd_k1`
without the noise of the drawn token, and here the teacher's whole distributions
cost no pass more than its drawn log-probabilities. beta = 0 covers all that the
teacher does, at the price of mass where it does nothing; which is best depends
on the task. A top-k support saves nothing here: take it to compare with code
that stores K ids, and not "none" with a forward KL alone, which collapsed in
TrOPD's runs. Prefer `opd_k1` to repeat published runs of on-policy
distillation.

Source: Agarwal et al., arXiv 2306.13649, Eq. 1; the other divergences and their
sources are in `divergences`. The temperature is the run's sampling temperature,
applied to both models, without the factor temperature^2. Completions are the
student's own; `rollout.stored_fraction`, 1 - lambda of the paper, takes stored
ones in their place.

Differs: the mean runs over all tokens of the batch (as in TRL);
reduction="seq_mean_token_mean" is the paper's mean per sequence. beta weighs
the teacher (as in TRL), where the JSD of DistiLLM's code weighs the student; at
0 and 1 it is the plain KL (as in TRL), though the formula goes to 0 at both
ends, so that 0.001 is not close in scale to 0. A support of K ids keeps the
mass outside as one more column where verl, NeMo-RL and ms-swift drop it by
default; normalization="none" is verl's form without its clamp at 0,
"renormalized" that of NeMo-RL and ms-swift.
"""

import dataclasses
from typing import Literal

from opd_jax.objectives import reduce
from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.objectives.divergences import Divergence
from opd_jax.objectives.supports import Support
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    divergence: what the two models are compared by: forward_kl, reverse_kl,
      jeffreys, jsd, skew_forward_kl, skew_reverse_kl, total_variation,
      squared_hellinger, pearson_chi_square, neyman_chi_square, le_cam or alpha.
    beta: of "jsd", the weight of the teacher in the mixture, in [0, 1]; 0 is
      forward KL, 1 is reverse KL. Paper: 0.1, 0.5 and 0.9 as well; TRL: 0.5 in
      its GKD, 1 in its distillation trainer.
    alpha: of "alpha" and the skewed KLs; DistiLLM has 0.1.
    support: the ids that are compared; the top k are per position.
    top_k: size of a support that is not the whole vocabulary; verl has 32,
      NeMo-RL and TrOPD 64, EOPD 16.
    normalization: what becomes of the mass outside such a support; None is
      "tail", which keeps it as one more id.
    reduction: see `reduce.row_scale`; TRL: this one.
  """

  divergence: str = "jsd"
  beta: float = 1.0
  alpha: float | None = None
  support: Literal["vocabulary", "teacher_top_k", "student_top_k", "union"] = (
    "vocabulary"
  )
  top_k: int | None = None
  normalization: (
    Literal["tail", "renormalized", "teacher_renormalized", "none"] | None
  ) = None
  reduction: str = "token_mean"

  def __post_init__(self):
    _support(self).check(_divergence(self))
    reduce.check(self.reduction)


def _divergence(config: Config) -> Divergence:
  beta = config.beta
  if config.divergence != "jsd" and beta == Config.beta:
    beta = None
  return Divergence(name=config.divergence, beta=beta, alpha=config.alpha)


def _support(config: Config) -> Support:
  normalization = config.normalization
  if config.support != "vocabulary" and normalization is None:
    normalization = "tail"
  return Support(
    name=config.support, top_k=config.top_k, normalization=normalization
  )


def check_vocabulary(config: Config, vocab_size: int) -> None:
  """Raises InputError if there are fewer ids than `top_k`."""
  _support(config).check_vocabulary(vocab_size)


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
  """The divergence, nats per completion token; the masses on a support."""
  student = scores.student.vocab_logprobs
  teacher = scores.teacher.vocab_logprobs
  support = _support(config)
  loss = support.divergence(_divergence(config), student, teacher)
  return (
    {"divergence": Term(loss, config.reduction)},
    support.statistics(student, teacher),
  )
