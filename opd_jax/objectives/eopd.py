"""Entropy-aware distillation: reverse KL, and forward KL where unsure (EOPD).

With s, t, b the log-probabilities of student, teacher and behavior of the
drawn token, o that of the student at the start of the step's updates, H_t the
teacher's entropy over the whole vocabulary, q the teacher on its K likeliest
ids, divided by its mass there, and sg the stop-gradient:

  A_t    = t_t - o_t
  r_t    = exp(s_t - sg(b_t))
  pg_t   = max(-r_t A_t, -clip(r_t, 1 - clip, 1 + clip) A_t)
  fkl_t  = sum_v q_v (log q_v - log student_v)            KL(q || student)
  loss_t = pg_t + coefficient [H_t > entropy_threshold] fkl_t

It adds: the policy gradient stays on at every token. At the first update of a
rollout batch its expected gradient is that of KL(student || teacher), at the
prefixes the student reaches. At later ones the frozen A makes it that of
KL(student || teacher) - KL(student || student at the start), within the clip,
which is then part of the method. The student in fkl is not divided by its mass,
so that fkl is at least -log of it.

Descends: KL(student || teacher), and KL(q || student) besides where the teacher
is unsure.

Off policy: a ratio with PPO's clip on the policy gradient, none on the forward
KL.

Use it when: reverse KL leaves the student more certain than its teacher and
several answers to a prompt matter: the abstract reports 1.4 to 5.1 points of
pass@8 over reverse KL, more for larger students. TrOPD's authors find 0.6 to
0.9 points with it; one reproduction, trained longer, found it below plain
distillation. It costs what `gkd` costs.

Source: Jin et al., arXiv 2603.07079, Eq. 7-10; clip 0.2 is that of the
re-implementations, the paper gives none.

Differs: entropy and distributions are at the run's temperature, the paper's
threshold is for temperature 1. The paper makes 4 updates per rollout batch,
which is `batch.mini_batches` = 4; the default is 1. The ratio is to the
sampler, which is the student at the start but for rounding, filters and
mixtures.
"""

import dataclasses
import math

import jax.numpy as jnp

from opd_jax.errors import InputError
from opd_jax.objectives import policy, reduce
from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.objectives.divergences import Divergence
from opd_jax.objectives.supports import Support
from opd_jax.types import Scores

_FORWARD_KL = Divergence(name="forward_kl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    entropy_threshold: nats; above it the forward KL is added. 0.8 in all
      accounts of the paper.
    coefficient: multiplies the forward KL; Eq. 9 as quoted has none, or 1.
    top_k: ids of the forward KL, the teacher's likeliest; 16 in all accounts of
      the paper, 64 in TrOPD's runs of it.
    clip: how far from 1 a ratio may push, in (0, 1); 0.2 in the
      re-implementations.
    reduction: see `reduce.row_scale`; paper: this one, Algorithm 1.
  """

  entropy_threshold: float = 0.8
  coefficient: float = 1.0
  top_k: int = 16
  clip: float = 0.2
  reduction: str = "token_mean"

  def __post_init__(self):
    if not self.entropy_threshold >= 0:
      raise InputError(
        f"entropy_threshold must be >= 0 nats, got {self.entropy_threshold}"
      )
    if not (math.isfinite(self.coefficient) and self.coefficient > 0):
      raise InputError(
        f"coefficient must be > 0 and finite, got {self.coefficient}; without "
        "the forward KL the objective is opd_k1"
      )
    if not 0 < self.clip < 1:
      raise InputError(f"clip must be in (0, 1), got {self.clip}")
    _support(self)
    reduce.check(self.reduction)


def _support(config: Config) -> Support:
  return Support(
    name="teacher_top_k",
    top_k=config.top_k,
    normalization="teacher_renormalized",
    whole=None,
  )


def check_vocabulary(config: Config, vocab_size: int) -> None:
  """Raises InputError if there are fewer ids than `top_k`."""
  _support(config).check_vocabulary(vocab_size)


def needs(config: Config) -> Needs:
  """Drawn tokens and whole distributions of both, the teacher's entropy."""
  return Needs(
    student=Request(logprobs=True, vocab_logprobs=True),
    teacher=Request(logprobs=True, entropy=True, vocab_logprobs=True),
    start=True,
  )


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """Policy gradient, and the forward KL at the gate; nats per token."""
  advantage = scores.teacher.logprobs - scores.start_logprobs
  ratio = policy.ratio(scores)
  pushed = policy.surrogate(ratio, advantage, config.clip, config.clip)
  forward = _support(config).divergence(
    _FORWARD_KL, scores.student.vocab_logprobs, scores.teacher.vocab_logprobs
  )
  unsure = scores.teacher.entropy > config.entropy_threshold
  gated = jnp.where(unsure, config.coefficient * forward, 0.0)
  return (
    {
      "policy": Term(pushed, config.reduction),
      "forward_kl": Term(gated, config.reduction),
    },
    {
      "advantage": Term(advantage),
      "ratio": Term(ratio),
      "gate": Term(unsure.astype(jnp.float32)),
    },
  )
