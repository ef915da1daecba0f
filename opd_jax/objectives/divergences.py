"""Divergences between two next-token distributions, in nats per position.

All take log-probabilities over the whole vocabulary [..., V] and reduce over V.
Gradient flows into whatever argument carries it; nothing is stopped here, and
nothing is clipped: where a divergence has no bound it may overflow float32.

Every divergence is a sum over columns of student_v f(teacher_v / student_v)
with f convex and f(1) = 0, in a form that never holds the quotient. So a
distribution may be given in parts, whose values add up, and a column that holds
`MASKED_LOGPROB` in both arguments contributes exactly 0. On distributions that
sum to 1 all are at least 0, and 0 for equal ones only.

Source: the family of the survey arXiv 2604.00626, Eq. 13, and of DistiLLM,
arXiv 2402.03898. Jeffreys, Hellinger, chi-square, Le Cam and alpha are textbook
members of it.

Differs: no factor temperature^2 (as in GKD and TRL, unlike the survey). Values
are divergences, where the code of DistiLLM and TAID leaves out the teacher's
entropy from the forward ones; the gradient is the same.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.errors import InputError


def kl(
  p_logprobs: Float[Array, "*batch V"], q_logprobs: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
  """KL(p || q) = sum_v p_v (log p_v - log q_v)."""
  return jnp.sum(jnp.exp(p_logprobs) * (p_logprobs - q_logprobs), axis=-1)


def forward_kl(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """KL(teacher || student); gradient in the student's logits s - t."""
  return kl(teacher_logprobs, student_logprobs)


def reverse_kl(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """KL(student || teacher); gradient s (log s - log t - KL)."""
  return kl(student_logprobs, teacher_logprobs)


def jeffreys(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """KL(teacher || student) + KL(student || teacher)."""
  return kl(teacher_logprobs, student_logprobs) + kl(
    student_logprobs, teacher_logprobs
  )


def generalized_jsd(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
  beta: float,
) -> Float[Array, "*batch"]:
  """JSD_beta: beta KL(teacher || M) + (1 - beta) KL(student || M).

  With M = beta teacher + (1 - beta) student: Eq. 1 of GKD (arXiv 2306.13649),
  the convention of TRL.

  beta = 0 is KL(teacher || student) (forward) and beta = 1 is
  KL(student || teacher) (reverse), by definition and not as a limit: the
  formula itself goes to 0 at both ends, so beta = 0.001 is not close in scale
  to beta = 0.

  Raises:
    InputError: beta outside [0, 1].
  """
  _check_beta(beta)
  if beta == 0:
    return kl(teacher_logprobs, student_logprobs)
  if beta == 1:
    return kl(student_logprobs, teacher_logprobs)
  mixture = _mixture(teacher_logprobs, student_logprobs, beta)
  return beta * kl(teacher_logprobs, mixture) + (1 - beta) * kl(
    student_logprobs, mixture
  )


def skew_forward_kl(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
  alpha: float,
) -> Float[Array, "*batch"]:
  """KL(teacher || alpha teacher + (1 - alpha) student), at most -log alpha.

  DistiLLM (arXiv 2402.03898); alpha = 0 is KL(teacher || student).

  Raises:
    InputError: alpha outside [0, 1); at 1 the value is 0 for all students.
  """
  _check_skew(alpha)
  if alpha == 0:
    return kl(teacher_logprobs, student_logprobs)
  mixture = _mixture(teacher_logprobs, student_logprobs, alpha)
  return kl(teacher_logprobs, mixture)


def skew_reverse_kl(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
  alpha: float,
) -> Float[Array, "*batch"]:
  """KL(student || alpha student + (1 - alpha) teacher), at most -log alpha.

  DistiLLM (arXiv 2402.03898); alpha = 0 is KL(student || teacher).

  Raises:
    InputError: alpha outside [0, 1); at 1 the value is 0 for all students.
  """
  _check_skew(alpha)
  if alpha == 0:
    return kl(student_logprobs, teacher_logprobs)
  mixture = _mixture(student_logprobs, teacher_logprobs, alpha)
  return kl(student_logprobs, mixture)


def total_variation(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """sum_v |teacher_v - student_v| / 2, at most 1; slope 0 where they agree."""
  gap = jnp.exp(teacher_logprobs) - jnp.exp(student_logprobs)
  return 0.5 * jnp.sum(jnp.abs(gap), axis=-1)


def squared_hellinger(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """sum_v (sqrt teacher_v - sqrt student_v)^2 / 2, at most 1."""
  gap = jnp.exp(0.5 * teacher_logprobs) - jnp.exp(0.5 * student_logprobs)
  return 0.5 * jnp.sum(gap**2, axis=-1)


def pearson_chi_square(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """sum_v (teacher_v - student_v)^2 / student_v, without bound."""
  return _chi_square(teacher_logprobs, student_logprobs)


def neyman_chi_square(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """sum_v (teacher_v - student_v)^2 / teacher_v, without bound."""
  return _chi_square(student_logprobs, teacher_logprobs)


def le_cam(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """sum_v (teacher_v - student_v)^2 / (teacher_v + student_v), at most 2."""
  teacher, student = jnp.exp(teacher_logprobs), jnp.exp(student_logprobs)
  total = teacher + student
  safe = jnp.where(total > 0, total, jnp.ones_like(total))
  return jnp.sum((teacher - student) ** 2 / safe, axis=-1)


def alpha_divergence(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
  alpha: float,
) -> Float[Array, "*batch"]:
  """(sum_v teacher_v^a student_v^(1-a) - 1) / (a (a - 1)), with a = alpha.

  alpha = 1 is KL(teacher || student), 0 is KL(student || teacher), 1/2 four
  times the squared Hellinger distance, 2 and -1 half of Pearson's and Neyman's
  chi-square. Between 0 and 1 it is at most 1 / (a (1 - a)). Float32 leaves
  about 1e-7 / |a (a - 1)| of it: close to 0 and 1 take the KLs.

  Raises:
    InputError: alpha is not finite.
  """
  _check_alpha(alpha)
  if alpha == 1:
    return kl(teacher_logprobs, student_logprobs)
  if alpha == 0:
    return kl(student_logprobs, teacher_logprobs)
  # The linear part makes each column's share its own: it sums to 1.
  power = jnp.exp(alpha * teacher_logprobs + (1 - alpha) * student_logprobs)
  linear = alpha * jnp.exp(teacher_logprobs) + (1 - alpha) * jnp.exp(
    student_logprobs
  )
  return jnp.sum(power - linear, axis=-1) / (alpha * (alpha - 1))


def entropy(logprobs: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
  """H(p) = -sum_v p_v log p_v."""
  return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def _mixture(
  p_logprobs: Float[Array, "*batch V"],
  q_logprobs: Float[Array, "*batch V"],
  weight: float,
) -> Float[Array, "*batch V"]:
  """log(weight p + (1 - weight) q), with weight in (0, 1)."""
  return jnp.logaddexp(
    p_logprobs + math.log(weight), q_logprobs + math.log1p(-weight)
  )


def _chi_square(
  p_logprobs: Float[Array, "*batch V"], q_logprobs: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
  """sum_v (p_v - q_v)^2 / q_v, as squares of (p - q) / sqrt q."""
  gap = jnp.exp(p_logprobs - 0.5 * q_logprobs) - jnp.exp(0.5 * q_logprobs)
  return jnp.sum(gap**2, axis=-1)


def _check_beta(beta: float) -> None:
  if not 0 <= beta <= 1:
    raise InputError(f"beta must be in [0, 1], got {beta}")


def _check_alpha(alpha: float) -> None:
  if not math.isfinite(alpha):
    raise InputError(f"alpha must be finite, got {alpha}")


def _check_skew(alpha: float) -> None:
  if not 0 <= alpha < 1:
    raise InputError(
      f"alpha of a skewed KL must be in [0, 1), got {alpha}; at 1 both sides "
      "are the same distribution and the loss is 0 whatever the student"
    )


DIVERGENCES: dict[str, Callable[..., Float[Array, "..."]]] = {
  "forward_kl": forward_kl,
  "reverse_kl": reverse_kl,
  "jeffreys": jeffreys,
  "jsd": generalized_jsd,
  "skew_forward_kl": skew_forward_kl,
  "skew_reverse_kl": skew_reverse_kl,
  "total_variation": total_variation,
  "squared_hellinger": squared_hellinger,
  "pearson_chi_square": pearson_chi_square,
  "neyman_chi_square": neyman_chi_square,
  "le_cam": le_cam,
  "alpha": alpha_divergence,
}

# The parameter of those that have one, and what checks it.
PARAMETERS: dict[str, tuple[str, Callable[[float], None]]] = {
  "jsd": ("beta", _check_beta),
  "skew_forward_kl": ("alpha", _check_skew),
  "skew_reverse_kl": ("alpha", _check_skew),
  "alpha": ("alpha", _check_alpha),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
  """A divergence by name, with its parameter.

  Attributes:
    name: a key of `DIVERGENCES`.
    beta: of "jsd", else None.
    alpha: of "alpha" and the skewed KLs, else None.
  """

  name: str
  beta: float | None = None
  alpha: float | None = None

  def __post_init__(self):
    if self.name not in DIVERGENCES:
      raise InputError(
        f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.name!r}"
      )
    mine, check = PARAMETERS.get(self.name, (None, None))
    for parameter in ("beta", "alpha"):
      value = getattr(self, parameter)
      if parameter == mine and value is None:
        raise InputError(
          f"divergence {self.name!r} has a parameter {parameter}, and none was "
          f"given; set {parameter}"
        )
      if parameter != mine and value is not None:
        owners = [
          name for name in PARAMETERS if PARAMETERS[name][0] == parameter
        ]
        raise InputError(
          f"{parameter} = {value} is a parameter of the divergences "
          f"{', '.join(owners)}, not of {self.name!r}; leave it out"
        )
    if mine is not None and check is not None:
      check(getattr(self, mine))

  def __call__(
    self,
    student_logprobs: Float[Array, "*batch V"],
    teacher_logprobs: Float[Array, "*batch V"],
  ) -> Float[Array, "*batch"]:
    """Nats per position."""
    function = DIVERGENCES[self.name]
    if self.name in PARAMETERS:
      parameter, _ = PARAMETERS[self.name]
      function = functools.partial(
        function, **{parameter: getattr(self, parameter)}
      )
    return function(student_logprobs, teacher_logprobs)

  @property
  def sheds_mass(self) -> bool:
    """Whether it falls as the student's mass leaves the columns it is given.

    Over whole distributions no divergence does, over a part of the columns
    those of the form sum_v student_v log(student_v / ...) do: for equal shares
    the slope in student_v is not 0 but positive.
    """
    return (
      self.name in ("reverse_kl", "skew_reverse_kl")
      or (self.name == "jsd" and self.beta == 1)
      or (self.name == "alpha" and self.alpha == 0)
    )
