"""Estimates of KL(student || teacher) from the drawn token, nats per token.

With d = log student - log teacher of a token that the student drew:

  k1  d                value without bias; variance as of the log-ratio
  k2  d^2 / 2          value with bias, at least 0
  k3  exp(-d) - 1 + d  value without bias, at least 0; it overflows float32
                       where the teacher gives 1e38 times the student's mass

What an estimate is worth as a value says nothing of its gradient. Over the
drawn token, with nothing done about the drawing itself:

  E[grad k1] = 0
  E[grad k2] = grad KL(student || teacher)
  E[grad k3] = grad KL(teacher || student)

So k1 descended teaches nothing (it is right as the reward of a policy gradient,
which is `opd_k1`), and k3 descended is another objective than its value says,
its slopes being as large as teacher / student. `loss` refuses both. "k3+" has
the value of k3 and the slope of k2.

Source: Schulman, "Approximating KL divergence" (2020), for the values; "k3+" is
the straight-through form of verl's `kl_penalty`.

Differs: verl clamps log-ratio and value of k3, where its slope is then 0;
nothing is clamped here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.errors import InputError


def k1(
  student_logprobs: Float[Array, "*batch"],
  teacher_logprobs: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
  """The log-ratio, student to teacher. A value: see the module."""
  return student_logprobs - teacher_logprobs


def k2(
  student_logprobs: Float[Array, "*batch"],
  teacher_logprobs: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
  """(log student - log teacher)^2 / 2; the one that may be descended."""
  return 0.5 * k1(student_logprobs, teacher_logprobs) ** 2


def k3(
  student_logprobs: Float[Array, "*batch"],
  teacher_logprobs: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
  """With u = teacher / student, u - 1 - log u. A value, as k1 is."""
  gap = teacher_logprobs - student_logprobs
  return jnp.expm1(gap) - gap


def _k3_straight_through(
  student_logprobs: Float[Array, "*batch"],
  teacher_logprobs: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
  slope = k2(student_logprobs, teacher_logprobs)
  value = k3(student_logprobs, teacher_logprobs)
  return slope + jax.lax.stop_gradient(value - slope)


LOSSES = {"k2": k2, "k3+": _k3_straight_through}

_REFUSED = {
  "k1": (
    "the expected gradient of k1 is 0, so that a run would only add noise to "
    "the weights; k1 is right as a reward: objective.name='opd_k1'"
  ),
  "k3": (
    "its expected gradient is that of KL(teacher || student), with slopes as "
    "large as teacher / student, not that of the KL(student || teacher) it "
    "estimates; take 'k3+' for its value with the slope of k2, or "
    "objective.name='gkd' with divergence='forward_kl'"
  ),
}


def check_loss(name: str) -> None:
  """Raises InputError unless the estimate may be descended, and says why."""
  if name in _REFUSED:
    raise InputError(
      f"estimator {name!r} cannot be a loss: {_REFUSED[name]}. As losses there "
      f"are {', '.join(LOSSES)}"
    )
  if name not in LOSSES:
    raise InputError(
      f"estimator must be one of {', '.join(LOSSES)}, got {name!r}"
    )


def loss(
  name: str,
  student_logprobs: Float[Array, "*batch"],
  teacher_logprobs: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
  """An estimate whose expected gradient is that of KL(student || teacher).

  Args:
    name: "k2" or "k3+".
    student_logprobs: of the drawn token; gradient flows.
    teacher_logprobs: of the drawn token.

  Raises:
    InputError: see `check_loss`.
  """
  check_loss(name)
  return LOSSES[name](student_logprobs, teacher_logprobs)
