"""Reverse KL of whole completions as a policy gradient (MiniLLM).

With s, t, b the log-probabilities of student, teacher and behavior of the drawn
token, o that of the student at the start of the step's updates, n_t the tokens
of the row from t on, and sg the stop-gradient:

  r_t    = clip((t_t - o_t) / reward_scaling, -max_reward, max_reward)
  R_t    = sum_(k >= t) discount^(k - t) r_k
  A_t    = R_t / n_t                                  R_t without length_norm
  A_t   <- (A_t - mean) / sqrt(variance + 1e-8)       not without whiten
  rho_t  = exp(s_t - sg(o_t)) w_t,   w_t = exp(o_t - b_t)
  pg_t   = max(-rho_t A_t, -clip(rho_t, 1 - clip, 1 + clip) A_t)
  loss_t = pg_t + single_step sum_v student_v (log student_v - log teacher_v)

Mean and variance (biased) run over the tokens of the update's batch that carry
loss. A is fixed over the updates of a rollout batch. w weighs for the sampler:
where a teacher draws too, `rollout.teacher_mix` = a, it is
p_student / (a p_teacher + (1 - a) p_student) of the token, in [0, 1 / (1 - a)].
It is per token: the prefixes stay those of the mixture.

What it descends: with discount 1, reward_scaling 1 and neither bound,
length_norm nor whitening, the first part has the expected gradient of
KL(student || teacher) of whole completions on policy, and with discount 0 that
of KL(student || teacher) at the visited prefixes, mixture or not. The second
part adds the latter; so the reward of the token itself is counted twice.

Descends: KL(student || teacher) of whole completions, discounted and whitened,
and KL(student || teacher) at the visited prefixes.

Off policy: a ratio to the start of the step's updates times the sampler's
weight, with PPO's clip on the product; the second part has none.

Use it when: the effect of a token on later prefixes is to count, which `gkd`
and `opd_k1` leave out, or the published recipe is to be repeated. Whitening and
the division by the tokens left change what is descended, and a sum over later
tokens is noisier than `opd_k1`. `prepare` costs one more pass of both heads.
Prefer `gkd` with beta = 1, which is the second part alone, otherwise.

Source: Gu et al., arXiv 2306.08543, Sec. 2.2, as its official code has it; the
defaults are those of its script for GPT-2, which makes 4 passes over a rollout
batch with teacher_mix 0.2.

Differs: the third part, a loss on a corpus of pretraining text, is left out. As
in the code, R begins with the reward of the token itself although the second
part has it too, and the second part has no weight w. Whitening leaves out
padding, over which the code runs it too.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
from opd_jax.types import Scores

_REVERSE_KL = Divergence(name="reverse_kl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    discount: weight of the next token's reward in this one's, in [0, 1].
    reward_scaling: nats that make a reward of 1.
    max_reward: symmetric bound of the scaled reward; None for off.
    length_norm: divide the sum of rewards by the tokens that are left.
    whiten: give the advantages of a batch mean 0 and variance 1.
    clip: how far from 1 a ratio may push, in (0, 1).
    single_step: coefficient of the reverse KL of whole distributions; 0 for
      none.
    reduction: see `reduce.row_scale`.
  """

  discount: float = 0.95
  reward_scaling: float = 0.5
  max_reward: float | None = 100.0
  length_norm: bool = True
  whiten: bool = True
  clip: float = 0.2
  single_step: float = 1.0
  reduction: str = "token_mean"

  def __post_init__(self):
    if not 0 <= self.discount <= 1:
      raise InputError(f"discount must be in [0, 1], got {self.discount}")
    if not (self.reward_scaling > 0 and math.isfinite(self.reward_scaling)):
      raise InputError(
        f"reward_scaling must be > 0 and finite, got {self.reward_scaling}"
      )
    if self.max_reward is not None and not self.max_reward > 0:
      raise InputError(
        f"max_reward must be > 0, got {self.max_reward}; None for off"
      )
    if not 0 < self.clip < 1:
      raise InputError(f"clip must be in (0, 1), got {self.clip}")
    if not (self.single_step >= 0 and math.isfinite(self.single_step)):
      raise InputError(
        f"single_step must be >= 0 and finite, got {self.single_step}"
      )
    reduce.check(self.reduction)


def needs(config: Config) -> Needs:
  """Drawn tokens of the student; whole distributions for the single step."""
  wide = config.single_step > 0
  return Needs(
    student=Request(logprobs=True, vocab_logprobs=wide),
    teacher=Request(vocab_logprobs=wide),
    start=True,
  )


def prepare_needs(config: Config) -> Needs:
  """Rewards of whole rows."""
  return Needs(teacher=Request(logprobs=True), start=True)


def prepare(
  config: Config, scores: Scores, state: State, schedule: Schedule
) -> Signals:
  """The advantages, which the batch is normalised by."""
  mask = scores.loss_mask
  reward = scores.teacher.logprobs - scores.start_logprobs
  reward = reward / config.reward_scaling
  if config.max_reward is not None:
    reward = jnp.clip(reward, -config.max_reward, config.max_reward)
  advantage = policy.discounted_sum(reward, mask, config.discount)
  if config.length_norm:
    left = policy.discounted_sum(jnp.ones_like(reward), mask, 1.0)
    advantage = advantage / jnp.maximum(left, 1.0)
  if config.whiten:
    advantage = _whiten(advantage, mask)
  return Signals(token={"advantage": advantage})


def _whiten(
  values: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
  """Mean 0 and variance 1 over the tokens of the mask."""
  count = jnp.maximum(jnp.sum(mask, dtype=values.dtype), 1.0)
  mean = jnp.sum(jnp.where(mask, values, 0.0)) / count
  centered = jnp.where(mask, values - mean, 0.0)
  return centered / jnp.sqrt(jnp.sum(centered**2) / count + 1e-8)


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """Policy gradient, and the reverse KL of whole distributions; per token."""
  advantage = signals.token["advantage"]
  ratio = policy.ratio(scores)
  loss = policy.surrogate(ratio, advantage, config.clip, config.clip)
  found = {"policy": Term(loss, config.reduction)}
  if config.single_step > 0:
    divergence = _REVERSE_KL(
      scores.student.vocab_logprobs, scores.teacher.vocab_logprobs
    )
    found["single_step"] = Term(
      config.single_step * divergence, config.reduction
    )
  return found, {
    "advantage": Term(advantage),
    "ratio": Term(ratio),
    "weight": Term(policy.sampler_weight(scores)),
  }
