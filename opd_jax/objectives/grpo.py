"""A control without a teacher: reinforcement by verified answers (GRPO).

With r_i the reward of completion i, G completions of one prompt, s, b the
log-probabilities of student and behavior of the drawn token, and sg the
stop-gradient:

  A_i    = (r_i - mean_G r) / (std_G r + 1e-6)    the same for all its tokens
  loss_t = -exp(s_t - sg(b_t)) * A_i              see `policy.surrogate`, clips
  kl_t   = kl * (s_t - ref_t)^2 / 2               only if kl > 0

std is the unbiased one, with G - 1 below. normalize_std=False leaves the
division out (Dr. GRPO): prompts that are nearly always or nearly never solved
then weigh less. A group whose rewards are all equal teaches nothing; one
completion per prompt is refused. The mean of a group holds the completion
itself, so without the division the expected gradient is (G - 1) / G times that
of the expected reward (with reduction="seq_mean_token_sum"; a mean over tokens
also divides by lengths that were drawn).

Rewards come from the run's verifier (`reward` in the config), so a step is two
programs with the host between them. No teacher is scored; `teacher` in the
config must still name one, and may name the student's own checkpoint.

Descends: the negative of the expected reward, relative to the other
completions of a prompt; no teacher.

Off policy: a ratio, with PPO's clips as the default.

Use it when: answers can be verified and a comparison must show what rewards
give without a teacher. It learns only from prompts whose completions differ in
reward, and needs several of each. Prefer a distillation objective where there
is a teacher.

Source: Shao et al., "DeepSeekMath", arXiv 2402.03300, Eq. 3, outcome
supervision of section 4.1.2; normalize_std as in arXiv 2503.20783;
clip_high > clip_low and reduction="token_mean" as in DAPO, arXiv 2503.14476;
1e-6 and the unbiased std as in verl.

Differs: the paper's penalty is the k3 estimate of KL(student || reference),
differentiated, whose expected gradient is that of KL(reference || student);
here it is k2, whose expected gradient is that of the KL it stands for (see
`estimators`). It is right for tokens from the student's whole distribution, and
kl > 0 refuses sampling filters and several updates. The paper's kl is 0.04; the
default is 0, as runs with verified rewards have it since, and needs no
reference.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opd_jax.errors import InputError
from opd_jax.objectives import estimators, policy, reduce
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

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    normalize_std: divide the advantages of a group by the deviation of its
      rewards.
    clip_low: the ratio is clipped at 1 - clip_low; None for no bound.
    clip_high: the ratio is clipped at 1 + clip_high; None for no bound.
    dual_clip: largest ratio of a token with negative advantage; None for off.
    kl: coefficient of the divergence from the reference, >= 0; other than 0
      needs a reference.
    reduction: see `reduce.row_scale`.
  """

  normalize_std: bool = True
  clip_low: float | None = 0.2
  clip_high: float | None = 0.2
  dual_clip: float | None = None
  kl: float = 0.0
  reduction: str = "seq_mean_token_mean"

  def __post_init__(self):
    if not (self.kl >= 0 and math.isfinite(self.kl)):
      raise InputError(f"kl must be >= 0 and finite, got {self.kl}; 0 for off")
    policy.check_clips(self.clip_low, self.clip_high, self.dual_clip)
    reduce.check(self.reduction)


def needs(config: Config) -> Needs:
  """The student's log-probabilities, rewards, the reference's if kl > 0."""
  return Needs(
    student=Request(logprobs=True),
    reference=Request(logprobs=config.kl > 0),
    rewards=True,
    groups=True,
    pure_sampling=config.kl > 0,
    single_update=config.kl > 0,
  )


def group_advantage(
  rewards: Float[Array, " B"],
  group: Int[Array, " B"],
  *,
  normalize_std: bool,
) -> Float[Array, " B"]:
  """Rewards less the mean of their group, over its deviation if asked.

  Args:
    rewards: of all rows of the batch.
    group: of each row, in [0, B); rows of a group may be anywhere.
    normalize_std: divide by the unbiased deviation + 1e-6. A group of one row,
      or of equal rewards, has advantage 0.
  """

  def total(values: Float[Array, " B"]) -> Float[Array, " B"]:
    sums = jax.ops.segment_sum(values, group, num_segments=len(values))
    return sums[group]

  size = total(jnp.ones_like(rewards))
  # From the least of the group, so that equal rewards differ by exactly 0.
  least = jax.ops.segment_min(rewards, group, num_segments=len(rewards))
  above = rewards - least[group]
  centred = above - total(above) / size
  if not normalize_std:
    return centred
  variance = total(centred**2) / jnp.maximum(size - 1, 1)
  return centred / (jnp.sqrt(variance) + _EPSILON)


def prepare(
  config: Config, scores: Scores, state: State, schedule: Schedule
) -> Signals:
  """The advantage of every row, from the groups of the global batch."""
  advantage = group_advantage(
    scores.rewards, scores.group, normalize_std=config.normalize_std
  )
  return Signals(row={"advantage": advantage})


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """-ratio * advantage, and the divergence from the reference."""
  ratio = policy.ratio(scores)
  advantage = jnp.broadcast_to(signals.row["advantage"][:, None], ratio.shape)
  loss = policy.surrogate(
    ratio, advantage, config.clip_low, config.clip_high, config.dual_clip
  )
  found = {"policy": Term(loss, config.reduction)}
  statistics = {"advantage": Term(advantage), "ratio": Term(ratio)}
  if config.kl > 0:
    student, reference = scores.student.logprobs, scores.reference.logprobs
    divergence = estimators.loss("k2", student, reference)
    found["kl"] = Term(config.kl * divergence, config.reduction)
    statistics["kl"] = Term(estimators.k1(student, reference))
  return found, statistics
