"""Policy gradient inside a trust region, something milder outside (TrOPD).

With s, t, b the log-probabilities of student, teacher and behavior of the
token, S the teacher's K likeliest ids, u uniform in [0, 1) for each token, and
sg the stop-gradient:

  A_t     = sg(t_t - s_t)
  P_t     = min(exp(A_t), 1)                  how far the token is trusted
  M_t     = [u_t < P_t]                       gate="bernoulli"
            P_t                               gate="expected"
            [A_t > tau]                       gate="threshold"
  loss_t  = M_t * -exp(s_t - sg(b_t)) A_t  +  (1 - M_t) * outlier_t
                                              of a drawn token
            beta (t_t - s_t)                  of a given one, beta "guidance"

  outlier_t = sum_(v in S) teacher_v (log teacher_v - log student_v)
                                              outlier="forward_kl"
              0                               outlier="mask"
              -exp(s_t - sg(b_t)) max(A_t, tau)    outlier="clip"

The forward KL, KL(teacher || student) over S, takes both models as they are,
not divided by their mass there; it may be negative, and nothing is clamped.
Its gradient in a logit stays in [-1, 1], where that of the policy gradient
grows with A. Of several updates per rollout batch each has A and P of the
student as it is; u stays that of the token.

What it descends on policy, per visited prefix, with "bernoulli" or "expected"
and "forward_kl": sum_v p_S f(p_T / p_S), f(u) = u ln(u)^2 / 2 for u <= 1 and
u - 1 - ln(u) above, plus sg(TV(p_S, p_T)) times the forward KL. "expected" has
the expectation of "bernoulli" and less noise; it is an addition of ours, as is
the mixture of "clip" with these two gates.

Descends: KL(student || teacher), tempered where the student overrates a token,
and KL(teacher || student) over the teacher's top K for the tokens outside the
region.

Off policy: a ratio without clips on the policy gradient, none on the forward
KL. The gate follows the current student.

Use it when: the student draws many tokens that the teacher finds unlikely, as
at the start with a distant teacher. The share outside the region is expected to
be the total variation, so that a student close to its teacher trains as with
`opd_k1`. The paper has 49.0 points without prefixes, averaged over three tests
of mathematics, where plain distillation has 46.8 and bounded rewards 47.9;
forward KL alone collapses. It costs what `gkd` costs; with outlier="mask" or
"clip", what `opd_k1` does.

Source: Xing et al., arXiv 2606.01249, Sec. 4 and Tables 1 and 4; no training
code is published.

Given tokens are what the teacher wrote: the beginnings of the completions with
`rollout.prefix` = "cosine", as in the paper, or whole ones with
`rollout.stored_fraction`. Their loss is maximum likelihood with a small weight;
t is there for the value alone. The other figures of the log are those of drawn
tokens. Old completions of the student would be imitated like the teacher's:
`rollout.replay_capacity` is refused.

Differs: that the trusted part is a policy gradient, and that the mean runs over
all tokens, given ones included, the paper does not say; tau it does not report,
so that it has no default here. The rewards of "clip" and "mask" it prints with
the sign turned, against its own tables; it says that the forward KL vanishes
where the student has no mass on S, while by its formula the value grows and the
gradient stays bounded. The paper always has prefixes; here they are the run's
choice. Its baseline of a Jensen-Shannon divergence, part of which is summed
over S and part sampled, is left out: its gradient is not that of the
divergence. `gkd` with divergence "jsd" has the exact one.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.errors import InputError
from opd_jax.objectives import policy, reduce
from opd_jax.objectives.base import (
  Needs,
  Request,
  Schedule,
  Signals,
  State,
  Term,
  Terms,
)
from opd_jax.objectives.divergences import Divergence
from opd_jax.objectives.supports import Support
from opd_jax.types import Scores

_FORWARD_KL = Divergence(name="forward_kl")
_GUIDANCE = 0.001


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    gate: how the trust region is drawn; paper: "bernoulli".
    outlier: the loss of tokens outside it; paper: "forward_kl".
    tau: lowest advantage, nats, < 0: of the region for gate="threshold", of
      the reward for outlier="clip"; None where neither is used.
    top_k: ids of the forward KL, the teacher's likeliest; None for all.
      Paper: 64.
    guidance: weight of given tokens, >= 0; None is the paper's 0.001, where
      there are any.
    reduction: see `reduce.row_scale`; the paper does not say.
  """

  gate: Literal["bernoulli", "expected", "threshold"] = "bernoulli"
  outlier: Literal["forward_kl", "mask", "clip"] = "forward_kl"
  tau: float | None = None
  top_k: int | None = 64
  guidance: float | None = None
  reduction: str = "token_mean"

  def __post_init__(self):
    if self.guidance is not None and not 0 <= self.guidance < float("inf"):
      raise InputError(
        f"guidance must be >= 0, got {self.guidance}; None for the paper's "
        f"{_GUIDANCE}"
      )
    used = self.gate == "threshold" or self.outlier == "clip"
    if used and (self.tau is None or not -float("inf") < self.tau < 0):
      raise InputError(
        'gate="threshold" and outlier="clip" need tau, the lowest advantage '
        f"in nats, < 0 and finite, got {self.tau}; the paper reports none, -1 "
        "and -2 are common"
      )
    if self.tau is not None and not used:
      raise InputError(
        f"tau = {self.tau} has no meaning with gate={self.gate!r} and "
        f'outlier={self.outlier!r}; leave it out, or set gate to "threshold" '
        'or outlier to "clip"'
      )
    _support(self)
    reduce.check(self.reduction)


def _tau(config: Config) -> float:
  """The lowest advantage; parsing has made sure of it where it is used."""
  return -float("inf") if config.tau is None else config.tau


def _support(config: Config) -> Support:
  if config.top_k is None:
    return Support()
  return Support(
    name="teacher_top_k",
    top_k=config.top_k,
    normalization="none",
    whole="top_k=None",
  )


def check_vocabulary(config: Config, vocab_size: int) -> None:
  """Raises InputError if there are fewer ids than `top_k`."""
  if config.outlier == "forward_kl":
    _support(config).check_vocabulary(vocab_size)


def needs(config: Config) -> Needs:
  """Drawn tokens of both models; whole distributions for the forward KL."""
  both = Request(logprobs=True, vocab_logprobs=config.outlier == "forward_kl")
  return Needs(
    student=both, teacher=both, given="must" if config.guidance else "may"
  )


def prepare(
  config: Config, scores: Scores, state: State, schedule: Schedule
) -> Signals:
  """The uniform of each token, for gate="bernoulli"; how many are drawn."""
  drawn = scores.loss_mask & scores.sampled_mask
  normalizer = {"drawn": jnp.sum(drawn, dtype=jnp.float32)}
  if config.gate != "bernoulli":
    return Signals(normalizer=normalizer)
  behavior = scores.behavior_logprobs
  coin = jax.random.uniform(schedule.key, behavior.shape, behavior.dtype)
  return Signals(token={"uniform": coin}, normalizer=normalizer)


def _outlier(
  config: Config,
  scores: Scores,
  ratio: Float[Array, "B T"],
  advantage: Float[Array, "B T"],
) -> Float[Array, "B T"]:
  if config.outlier == "mask":
    return jnp.zeros_like(advantage)
  if config.outlier == "clip":
    return policy.surrogate(ratio, jnp.maximum(advantage, _tau(config)))
  return _support(config).divergence(
    _FORWARD_KL, scores.student.vocab_logprobs, scores.teacher.vocab_logprobs
  )


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """The two sides of the gate and the guidance, nats per completion token."""
  advantage = policy.gap(scores)
  ratio = policy.ratio(scores)
  trust = jnp.exp(jnp.minimum(advantage, 0.0))
  inside = trust
  if config.gate == "bernoulli":
    inside = (signals.token["uniform"] < trust).astype(trust.dtype)
  elif config.gate == "threshold":
    inside = (advantage > _tau(config)).astype(trust.dtype)
  outlier = _outlier(config, scores, ratio, advantage)
  drawn = scores.sampled_mask
  beta = _GUIDANCE if config.guidance is None else config.guidance
  missing = scores.teacher.logprobs - scores.student.logprobs

  def of_drawn(values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.where(drawn, values, 0.0)

  terms = {
    "policy": of_drawn(inside * policy.surrogate(ratio, advantage)),
    "outlier": of_drawn((1 - inside) * outlier),
    "guidance": jnp.where(drawn, 0.0, beta * missing),
  }
  statistics = {
    "advantage": advantage,
    "ratio": ratio,
    "trust": trust,
    "inside": inside,
  }
  return (
    {name: Term(loss, config.reduction) for name, loss in terms.items()},
    {
      name: Term(of_drawn(values), "selection_mean", "drawn")
      for name, values in statistics.items()
    },
  )
