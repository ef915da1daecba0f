"""Distillation with a reference whose share of the reward is scaled (G-OPD).

With s, t, r, b the log-probabilities of student, teacher, reference and
behavior of the drawn token, o that of the student at the start of the step's
updates, and sg the stop-gradient:

  A_t    = sg((t_t - s_t) + (lam - 1) (t_t - r_t))     the advantage, nats
  w_t    = min(exp(o_t - b_t), max_weight)             1 if max_weight is None
  loss_t = -exp(s_t - sg(o_t)) * w_t * A_t

At the first update of a rollout batch o is s, and the first factor 1 with the
gradient of log pi; at later ones it weighs for how far the student has moved,
and A is of the student as it is.

lam = 1 is `opd_k1` and needs no reference; 0 < lam < 1 stops short of the
teacher; lam > 1 goes past it, along the way from reference to teacher (ExOPD).
The reference is the student's first checkpoint, or the model the teacher was
trained from ("reward correction"). It reads the student's prompts.

The gradient is, per visited prefix, that of KL(student || target) with
log target = lam log teacher + (1 - lam) log reference, normalised at every
token. (The optimum of the paper's Eq. 12 normalises the same tilt over whole
sequences; the two agree at the last token only.)

Descends: KL(student || target), log target = lam log teacher + (1 - lam) log
reference, per token; by default the teacher itself.

Off policy: a truncated weight for the sampler, without clips.

Use it when: the student should stop between reference and teacher: the paper
finds accuracy and answer length in between for lam in (0, 1). It is also
`opd_k1` with a bounded correction for the sampler (lam = 1). To go past the
teacher take `exopd`. Other than at lam = 1 it costs a third model in memory and
its forward pass.

Source: "Learning beyond Teacher", arXiv 2602.12125, Eq. 11-14, and the code of
G-OPD; max_weight is its rollout correction.

Differs: the sign is the code's; Eq. 14 prints its negative under a max. The
mean runs over all tokens of the batch, where the paper sums over those of a
completion; reduction="seq_mean_token_mean" is what the code computes, whose
token mean is one of micro-batches of one row. Without a reference the code
falls back to plain OPD in silence; here this is an error. Its config also has
PPO clips (0.2, dual 3), which never bite with its one update per batch; there
are none here.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.errors import InputError
from opd_jax.objectives import policy, reduce
from opd_jax.objectives.base import Needs, Request, Signals, Term, Terms
from opd_jax.types import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options.

  Attributes:
    lam: weight of log teacher - log reference, >= 0; other than 1 needs a
      reference. Paper: 0 to 1.5 in steps of 0.25.
    max_gap: symmetric bound of log teacher - log reference, nats; None for off,
      as in the paper.
    max_weight: bound of the weight that corrects for the sampler; None for no
      correction, which refuses sampling filters. Official scripts: 5.
    reduction: see `reduce.row_scale`; official code: "seq_mean_token_mean".
  """

  lam: float = 1.0
  max_gap: float | None = None
  max_weight: float | None = 5.0
  reduction: str = "token_mean"

  def __post_init__(self):
    if not (self.lam >= 0 and math.isfinite(self.lam)):
      raise InputError(f"lam must be >= 0 and finite, got {self.lam}")
    for name in ("max_gap", "max_weight"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise InputError(f"{name} must be > 0, got {value}; None for off")
    reduce.check(self.reduction)


def needs(config: Config) -> Needs:
  """Log-probabilities of the drawn tokens; the reference's unless lam is 1."""
  return Needs(
    student=Request(logprobs=True),
    teacher=Request(logprobs=True),
    reference=Request(logprobs=config.lam != 1),
    pure_sampling=config.max_weight is None,
    start=True,
  )


def _advantage(config: Config, scores: Scores) -> Float[Array, "B T"]:
  advantage = policy.gap(scores)
  if config.lam == 1:
    return advantage
  beyond = scores.teacher.logprobs - scores.reference.logprobs
  if config.max_gap is not None:
    beyond = jnp.clip(beyond, -config.max_gap, config.max_gap)
  return advantage + (config.lam - 1) * jax.lax.stop_gradient(beyond)


def terms(
  config: Config, scores: Scores, signals: Signals
) -> tuple[Terms, Terms]:
  """-ratio * weight * advantage, nats per completion token."""
  advantage = _advantage(config, scores)
  loss = policy.surrogate(policy.moved_ratio(scores), advantage)
  statistics = {"advantage": Term(advantage)}
  if config.max_weight is not None:
    weight = jnp.minimum(policy.sampler_weight(scores), config.max_weight)
    statistics["weight"] = Term(weight)
    loss = loss * weight
  return {"policy": Term(loss, config.reduction)}, statistics
