"""Sampled-token reverse KL as a policy gradient: plain on-policy distillation.

With s, t, b the log-probabilities of student, teacher and behavior of the
drawn token, and sg the stop-gradient:

  A_t    = coefficient * sg(t_t - s_t)        the advantage; b_t in place of
                                              s_t with baseline="behavior"
  A_t   <- sum_k discount^k A_(t+k)           only if discount > 0
  loss_t = -exp(s_t - sg(b_t)) * A_t          see `policy.surrogate` for clips

On policy the ratio is 1 and the loss value is the k1 estimate of
KL(student || teacher); the gradient is REINFORCE with the per-token reward
-(s - t), that is, discount 0 of Eq. 5-6 of arXiv 2602.12125. k1 itself is never
differentiated: its expected gradient is 0.

Descends: KL(student || teacher) at the visited prefixes with discount 0, of
whole completions with discount 1.

Off policy: a ratio, with clips as an option; nothing corrects for the ids that
a sampling filter removes. With S those that it keeps, what is descended at a
prefix is sum_(v in S) student_v (log student_v - log teacher_v - 1), S fixed:
no divergence, and mass may move to ids outside of S that the teacher dislikes.

Use it when: published runs of on-policy distillation are to be repeated, or
other objectives on drawn tokens compared with their base. One token a position
makes a noisy gradient, and a drawn token that the teacher finds very unlikely
an advantage without bound: `max_advantage`, `reopold` and `tropd` are about
these. Prefer `gkd` with beta = 1 for the same expected gradient without that
noise, at the same passes of the models.

Source: Thinking Machines Lab, "On-Policy Distillation" (2025), tinker-cookbook
`distillation/train_on_policy.py`.

Differs: no mean is subtracted from the advantage, as in tinker's distillation.
Log-ratios are not clamped before exp, where verl holds them in [-20, 20].
verl's losses take k3, differentiated directly, by default: see `opd_k2`. An
older page of slime's documentation prints KL(teacher || student); its code has
this direction.

The advantage uses the current student by default (as verl and G-OPD
do), so that after the first of several updates the gradient stays that of the
reverse KL, at the prefixes that were visited. baseline="behavior" is tinker's
form, and then descends KL(student || teacher) - KL(student || behavior).
"""

import dataclasses
import math
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
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    coefficient: multiplies the advantage; tinker, slime: 1.
    discount: weight of the next token's advantage in this one's, in [0, 1];
      tinker: 0.
    max_advantage: symmetric bound of the advantage, nats; None for off, as in
      tinker.
    clip_low: the ratio is clipped at 1 - clip_low; None for no bound, as in
      tinker; verl: 0.2.
    clip_high: the ratio is clipped at 1 + clip_high; None for no bound, as in
      tinker; verl: 0.2.
    dual_clip: largest ratio of a token with negative advantage; None for off,
      as in tinker; verl: 3.
    baseline: the log-probability the teacher's is compared with; verl: the
      student's, tinker: the behavior's.
    reduction: see `reduce.row_scale`; verl: this one.
  """

  coefficient: float = 1.0
  discount: float = 0.0
  max_advantage: float | None = None
  clip_low: float | None = None
  clip_high: float | None = None
  dual_clip: float | None = None
  baseline: Literal["student", "behavior"] = "student"
  reduction: str = "token_mean"

  def __post_init__(self):
    if not math.isfinite(self.coefficient):
      raise InputError(f"coefficient must be finite, got {self.coefficient}")
    if not 0 <= self.discount <= 1:
      raise InputError(f"discount must be in [0, 1], got {self.discount}")
    if self.max_advantage is not None and not self.max_advantage > 0:
      raise InputError(
        f"max_advantage must be > 0, got {self.max_advantage}; None for off"
      )
    policy.check_clips(self.clip_low, self.clip_high, self.dual_clip)
    reduce.check(self.reduction)


def needs(config: Config) -> Needs:
  """Log-probabilities of the drawn tokens under both models."""
  return Needs(student=Request(logprobs=True), teacher=Request(logprobs=True))


def prepare_needs(config: Config) -> Needs:
  """The discounted sum runs over the row: the same fields, before the terms."""
  return needs(config) if config.discount > 0 else Needs()


def _advantage(config: Config, scores: Scores) -> Float[Array, "B T"]:
  baseline = (
    scores.behavior_logprobs
    if config.baseline == "behavior"
    else scores.student.logprobs
  )
  return config.coefficient * jax.lax.stop_gradient(
    scores.teacher.logprobs - baseline
  )


def prepare(
  config: Config, scores: Scores, state: State, schedule: Schedule
) -> Signals:
  """Discounted advantages, if there is a discount."""
  if config.discount == 0:
    return Signals()
  advantage = policy.discounted_sum(
    _advantage(config, scores), scores.loss_mask, config.discount
  )
  return Signals(token={"advantage": advantage})


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """-ratio * advantage, nats per completion token."""
  if config.discount > 0:
    advantage = signals.token["advantage"]
  else:
    advantage = _advantage(config, scores)
  if config.max_advantage is not None:
    advantage = jnp.clip(advantage, -config.max_advantage, config.max_advantage)
  ratio = policy.ratio(scores)
  loss = policy.surrogate(
    ratio, advantage, config.clip_low, config.clip_high, config.dual_clip
  )
  return (
    {"policy": Term(loss, config.reduction)},
    {"advantage": Term(advantage), "ratio": Term(ratio)},
  )
