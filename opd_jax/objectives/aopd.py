"""Policy gradient where the teacher likes a token more, imitation elsewhere.

Asymmetric on-policy distillation (AOPD). With s, t, b the log-probabilities of
student, teacher and behavior of the drawn token, S the teacher's K likeliest
ids, and sg the stop-gradient:

  A_t    = sg(t_t - s_t)
  pg_t   = -exp(s_t - sg(b_t)) * A_t
  fkl_t  = sum_(v in S) teacher_v (log teacher_v - log student_v)
  loss_t = fkl_t  where exp(t_t) - exp(s_t) <= tau,  pg_t elsewhere

tau = 0 is the sign of A. tau = -1 is `opd_k1` everywhere, tau = 1 forward KL
everywhere; more imitates more. fkl_t is KL(teacher || student) over S, as
`supports` normalises it: with "none" it may be negative, and nothing is
clamped. The choice is made anew at each of several updates.

What it descends on policy with tau = 0, per visited prefix:

  sum_(v: p_S < p_T) (p_S ln(p_S / p_T) - p_S + p_T)  +  sg(P_S[A <= 0]) fkl

so tokens that the student finds too likely are pulled down by imitation alone.

Descends: KL(student || teacher), one-sided, on tokens the student underrates;
on the others KL(teacher || student) over the teacher's top K.

Off policy: a ratio without clips on the policy gradient, none on the imitated
tokens. Gate and advantage follow the current student.

Use it when: the pull of `opd_k1` on tokens the teacher dislikes, which has no
bound, makes training unstable. The paper's abstract reports 4 to 8 points over
plain distillation; TrOPD's authors find 2.7 with it, and 3.5 with `tropd`,
where the chance of imitation grows with the gap; an independent study of three
student sizes saw gains of 0.7 and 2.1 and a loss of 4.0. It costs what `gkd`
costs, which has the forward KL alone.

Source: Jia et al., arXiv 2605.06387, Eq. 1-2, 9-11 as quoted by a
source-checked ledger; the body was not available, and there is no official
code.

Differs: K and the normalisation of fkl are not in those sources; K = 64 is what
TrOPD (arXiv 2606.01249) uses for every method with forward KL, "none" is
TrOPD's too. A = 0 goes to imitation, as the gate is written. The JSD that the
paper tries in place of the forward KL is not offered.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opd_jax.errors import InputError
from opd_jax.objectives import policy, reduce
from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.objectives.divergences import Divergence
from opd_jax.objectives.supports import Normalization, Support
from opd_jax.types import Scores

_FORWARD_KL = Divergence(name="forward_kl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    tau: gap of probabilities, teacher less student, up to which a token is
      imitated, in [-1, 1]; paper: 0.
    top_k: ids of the forward KL, the teacher's likeliest; None for all. 64 is
      TrOPD's; code of third parties has 8, 16 and 100.
    normalization: what becomes of the mass outside these ids; without meaning
      for all of them. "none" is TrOPD's.
    reduction: see `reduce.row_scale`; paper: this one, Eq. 10.
  """

  tau: float = 0.0
  top_k: int | None = 64
  normalization: Normalization = "none"
  reduction: str = "seq_mean_token_mean"

  def __post_init__(self):
    if not -1 <= self.tau <= 1:
      raise InputError(f"tau must be in [-1, 1], got {self.tau}")
    _support(self)
    reduce.check(self.reduction)


def _support(config: Config) -> Support:
  if config.top_k is None:
    return Support()
  return Support(
    name="teacher_top_k",
    top_k=config.top_k,
    normalization=config.normalization,
    whole="top_k=None",
  )


def check_vocabulary(config: Config, vocab_size: int) -> None:
  """Raises InputError if there are fewer ids than `top_k`."""
  _support(config).check_vocabulary(vocab_size)


def needs(config: Config) -> Needs:
  """Drawn tokens and whole distributions of both models."""
  both = Request(logprobs=True, vocab_logprobs=True)
  return Needs(student=both, teacher=both)


def _imitated(config: Config, scores: Scores) -> Bool[Array, "B T"]:
  if config.tau == 0:
    return policy.gap(scores) <= 0
  student = jax.lax.stop_gradient(scores.student.logprobs)
  return jnp.exp(scores.teacher.logprobs) - jnp.exp(student) <= config.tau


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """Policy gradient on one part of the tokens, forward KL on the other."""
  advantage = policy.gap(scores)
  ratio = policy.ratio(scores)
  forward: Float[Array, "B T"] = _support(config).divergence(
    _FORWARD_KL, scores.student.vocab_logprobs, scores.teacher.vocab_logprobs
  )
  imitated = _imitated(config, scores)
  pushed = jnp.where(imitated, 0.0, policy.surrogate(ratio, advantage))
  followed = jnp.where(imitated, forward, 0.0)
  return (
    {
      "policy": Term(pushed, config.reduction),
      "forward_kl": Term(followed, config.reduction),
    },
    {
      "advantage": Term(advantage),
      "ratio": Term(ratio),
      "imitated": Term(imitated.astype(jnp.float32)),
    },
  )
