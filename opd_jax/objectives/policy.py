"""The policy gradient on drawn tokens: what objectives with advantages share.

With s, b the log-probabilities of student and behavior of the drawn token, o
that of the student at the start of the step's updates, and sg the
stop-gradient:

  ratio = exp(s - sg(b)) = exp(s - sg(o)) exp(o - b)

The first factor says how far the student has moved since it drew the tokens,
the second how far the sampler is from it: by rounding, by a sampling filter, or
because a teacher drew with it. At the first update of a rollout batch, which
is the only one by default, the first factor is 1, with the gradient of log pi,
and clips bite on the second only. At later updates of the same batch the ratio
keeps the expected gradient of each token exact at the prefixes that were
visited; the prefixes stay those of the student that drew them.

A ratio weighs tokens that are drawn, and cannot for those that never are. Where
a sampling filter keeps the ids S, expectations run over S alone. With the
advantage log teacher - log student what is descended at a prefix is then

  sum_(v in S) student_v (log student_v - log teacher_v - 1)      S fixed

and not the reverse KL: where that sum without the -1 is positive, ids outside S
gain mass, whatever the teacher gives them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opd_jax.errors import InputError
from opd_jax.types import Scores


def ratio(scores: Scores) -> Float[Array, "B T"]:
  """exp(s - sg(b)); gradient flows through the student."""
  return jnp.exp(
    scores.student.logprobs - jax.lax.stop_gradient(scores.behavior_logprobs)
  )


def moved_ratio(scores: Scores) -> Float[Array, "B T"]:
  """exp(s - sg(o)): exactly 1 at the first update; needs `start`."""
  return jnp.exp(scores.student.logprobs - scores.start_logprobs)


def sampler_weight(scores: Scores) -> Float[Array, "B T"]:
  """exp(o - b): of the student over the sampler; needs `start`."""
  return jnp.exp(scores.start_logprobs - scores.behavior_logprobs)


def gap(scores: Scores) -> Float[Array, "B T"]:
  """sg(log teacher - log student) of the drawn token, nats."""
  return jax.lax.stop_gradient(
    scores.teacher.logprobs - scores.student.logprobs
  )


def surrogate(
  ratios: Float[Array, "B T"],
  advantage: Float[Array, "B T"],
  clip_low: float | None = None,
  clip_high: float | None = None,
  dual_clip: float | None = None,
) -> Float[Array, "B T"]:
  """The loss of a policy gradient, per token, in the unit of the advantage.

    -r A                                      without a clip
    max(-r A, -clip(r, 1 - low, 1 + high) A)  PPO, arXiv 1707.06347, Eq. 7
    min(that, -dual A) where A < 0            dual clip, arXiv 1912.09729

  A clip that wins has gradient 0: it stops a token whose ratio has already
  moved where its advantage pulls it. The dual clip also stops a token of
  negative advantage whose ratio is above `dual_clip`.

  Args:
    ratios: carry the gradient.
    advantage: nats; must be without gradient.
    clip_low: how far below 1 a ratio may push, in [0, 1]; None for no bound.
    clip_high: how far above 1; None for no bound.
    dual_clip: largest ratio of a token with negative advantage; None for off.
  """
  loss = -ratios * advantage
  if clip_low is not None or clip_high is not None:
    clipped = jnp.clip(
      ratios,
      None if clip_low is None else 1 - clip_low,
      None if clip_high is None else 1 + clip_high,
    )
    loss = jnp.maximum(loss, -clipped * advantage)
  if dual_clip is not None:
    bounded = jnp.minimum(loss, -dual_clip * advantage)
    loss = jnp.where(advantage < 0, bounded, loss)
  return loss


def check_clips(
  clip_low: float | None, clip_high: float | None, dual_clip: float | None
) -> None:
  """Raises InputError unless the bounds of `surrogate` make sense."""
  if clip_low is not None and not 0 <= clip_low <= 1:
    raise InputError(
      f"clip_low must be in [0, 1], got {clip_low}; None for no bound"
    )
  if clip_high is not None and not clip_high >= 0:
    raise InputError(
      f"clip_high must be >= 0, got {clip_high}; None for no bound"
    )
  if dual_clip is not None and not dual_clip > 1 + (clip_high or 0.0):
    raise InputError(
      f"dual_clip must be > 1 + clip_high = {1 + (clip_high or 0.0)}, got "
      f"{dual_clip}; None for off"
    )


def discounted_sum(
  values: Float[Array, "B T"], mask: Bool[Array, "B T"], discount: float
) -> Float[Array, "B T"]:
  """sum_(k >= 0) discount^k values_(t+k); masked positions count as 0.

  The sum runs through masked positions: a gap costs powers of the discount.
  """

  def step(
    following: Float[Array, " B"], value: Float[Array, " B"]
  ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    total = value + discount * following
    return total, total

  masked = jnp.where(mask, values, 0.0)
  _, sums = jax.lax.scan(
    step, jnp.zeros_like(masked[:, 0]), masked.T, reverse=True
  )
  return sums.T
