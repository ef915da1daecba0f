"""Reverse KL with bounded rewards and chosen tokens (REOPOLD).

With s, t, b the log-probabilities of student, teacher and behavior of the
drawn token, H the student's entropy there, and sg the stop-gradient:

  R_t    = sg(t_t - s_t)                       the reward, nats
  R_t   <- max(R_t, floor)                     not in "entropy_only"
  loss_t = -exp(s_t - sg(b_t)) * R_t * M_t     mean over the tokens with M = 1

  floor = ln(lam) / (1 - lam)                  floor_form="log_ratio"
          ln(lam / (1 - lam))                  floor_form="logit"
          fixed_floor                          floor_form="fixed"

  variant="two_stage"     M_t = [t_t - s_t >= floor] before the switch, then
                          M_t = [H_t in the batch's top `keep`]
  variant="clip_only"     M_t = 1 everywhere
  variant="entropy_only"  M_t = [H_t in the batch's top `keep`], R unbounded

The floor bounds log(mixture / student), mixture = lam student + (1 - lam)
teacher, from below. Before the switch it never bites, since the tokens it
would bound are dropped; after it, a bounded token of high entropy stays. The
top `keep` of n tokens are 1 + floor(keep (n - 1)), those at or above the
quantile, over the whole batch of the update. Of several updates per rollout
batch each has R, M and H of the student as it is.

What it descends, per visited prefix, M = 1: sum_v p_S f(p_T / p_S) with
f(u) = -ln u for u >= e^floor and its tangent 1 - floor - u e^-floor below, a
divergence that never exceeds KL(student || teacher). Before the switch the
same with f(u) = 1 - u (1 + floor) e^-floor below: dropped tokens no longer
pull, and the kink at e^floor is not convex for floor < -1. The entropy choice
descends no fixed quantity.

Descends: a divergence of at most KL(student || teacher); the entropy choice
descends no fixed quantity.

Off policy: a ratio without clips. The reward follows the current student, as in
Algorithm 1 as quoted.

Use it when: single tokens that the teacher finds very unlikely dominate the
gradient of `opd_k1`. variant="clip_only" is what held in TrOPD's runs, 1.7
points over plain distillation and 0.3 for another student, at the cost of
`opd_k1`; the two stages ended 0.2 points below plain there. The choice of
tokens costs one more pass of the student's head.

Source: Ko et al., arXiv 2603.11137, Eq. 4, 7-10 as quoted by PW-OPSD's
released code and by reading notes; the method section itself and official code
were not available.

Differs: sources disagree on the floor; "log_ratio" is the one that released
code states with its number (lam = 0.1: -2.56). They disagree on lam (0.1, 0.2,
0.3) and keep (0.2, 0.5) too. TrOPD (arXiv 2606.01249) reports "clip_only"
under the name REOPOLD.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from opd_jax.errors import InputError
from opd_jax.objectives import policy, reduce, selection
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
    variant: which tokens carry loss, and whether rewards are bounded; paper:
      "two_stage".
    lam: the student's weight in the mixture, in (0, 1); more bounds more. 0.1
      is PW-OPSD's; other accounts of the paper have 0.2 and 0.3.
    floor_form: how the lower bound of the reward comes from lam; PW-OPSD:
      "log_ratio".
    fixed_floor: that bound, nats, <= 0; for floor_form="fixed" only.
    keep: fraction of tokens kept by entropy, in (0, 1]; 0.2 in two accounts of
      the paper, 0.5 in one.
    switch: fraction of the run after which tokens are chosen by entropy; paper
      as quoted: step 150 of 300.
    reduction: see `reduce.row_scale`; "selection_mean", as Eq. 4, divides by
      the number of tokens with M = 1.
  """

  variant: Literal["two_stage", "clip_only", "entropy_only"] = "two_stage"
  lam: float = 0.1
  floor_form: Literal["log_ratio", "logit", "fixed"] = "log_ratio"
  fixed_floor: float | None = None
  keep: float = 0.2
  switch: float = 0.5
  reduction: str = reduce.SELECTION_MEAN

  def __post_init__(self):
    for name, read in (
      ("lam", self.variant != "entropy_only" and self.floor_form != "fixed"),
      ("floor_form", self.variant != "entropy_only"),
      ("keep", self.variant != "clip_only"),
      ("switch", self.variant == "two_stage"),
    ):
      value = getattr(self, name)
      if not read and value != getattr(Config, name):
        raise InputError(
          f"{name} = {value!r} has no effect with variant={self.variant!r} and "
          f"floor_form={self.floor_form!r}; leave it out"
        )
    if not 0 < self.lam < 1:
      raise InputError(f"lam must be in (0, 1), got {self.lam}")
    if (self.fixed_floor is not None) != (self.floor_form == "fixed"):
      raise InputError(
        'fixed_floor is for floor_form="fixed", which needs it; got '
        f"fixed_floor={self.fixed_floor} with floor_form={self.floor_form!r}"
      )
    if not (self.floor <= 0 and math.isfinite(self.floor)):
      raise InputError(
        f"the floor of the reward must be <= 0 and finite, got {self.floor} "
        f"from floor_form={self.floor_form!r}: a positive one would reward "
        'tokens that the teacher finds unlikely; "logit" takes lam <= 0.5'
      )
    if not 0 < self.keep <= 1:
      raise InputError(f"keep must be in (0, 1], got {self.keep}")
    if not 0 <= self.switch <= 1:
      raise InputError(
        f"switch must be in [0, 1], a fraction of the run, got {self.switch}"
      )
    reduce.check(self.reduction)

  @property
  def floor(self) -> float:
    """The lower bound of the reward, nats."""
    if self.fixed_floor is not None:
      return self.fixed_floor
    if self.floor_form == "logit":
      return math.log(self.lam / (1 - self.lam))
    return math.log(self.lam) / (1 - self.lam)


def needs(config: Config) -> Needs:
  """Log-probabilities of the drawn tokens under both models."""
  return Needs(student=Request(logprobs=True), teacher=Request(logprobs=True))


def prepare_needs(config: Config) -> Needs:
  """What the choice of tokens reads: rewards, entropy, both or nothing."""
  if config.variant == "clip_only":
    return Needs()
  if config.variant == "entropy_only":
    return Needs(student=Request(entropy=True))
  return Needs(
    student=Request(logprobs=True, entropy=True),
    teacher=Request(logprobs=True),
  )


def prepare(
  config: Config, scores: Scores, state: State, schedule: Schedule
) -> Signals:
  """The chosen tokens of the batch, and how many they are."""
  chosen = mask = scores.loss_mask
  if config.variant != "clip_only":
    chosen = selection.top_fraction(scores.student.entropy, mask, config.keep)
  if config.variant == "two_stage":
    good = mask & (policy.gap(scores) >= config.floor)
    chosen = jnp.where(schedule.progress >= config.switch, chosen, good)
  kept = chosen.astype(scores.behavior_logprobs.dtype)
  return Signals(token={"kept": kept}, normalizer={"kept": jnp.sum(kept)})


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """-ratio * bounded reward of the chosen tokens, nats."""
  reward = policy.gap(scores)
  ratio = policy.ratio(scores)
  statistics = {"reward": Term(reward), "ratio": Term(ratio)}
  if config.variant != "entropy_only":
    below = (reward < config.floor).astype(jnp.float32)
    statistics["clipped"] = Term(below)
    reward = jnp.maximum(reward, config.floor)
  loss = policy.surrogate(ratio, reward)
  kept = signals.token["kept"]
  statistics["kept"] = Term(kept)
  term = Term(loss * kept, config.reduction, "kept")
  return {"policy": term}, statistics
