"""Divergences between two next-token distributions, in nats per position.

All take log-probabilities over the whole vocabulary [..., V] and reduce over V.
Gradient flows into whatever argument carries it; nothing is stopped here. A
column that holds `MASKED_LOGPROB` in both arguments contributes exactly 0.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.errors import InputError


def kl(
  p_logprobs: Float[Array, "*batch V"], q_logprobs: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
  """KL(p || q) = sum_v p_v (log p_v - log q_v)."""
  return jnp.sum(jnp.exp(p_logprobs) * (p_logprobs - q_logprobs), axis=-1)


def generalized_jsd(
  student_logprobs: Float[Array, "*batch V"],
  teacher_logprobs: Float[Array, "*batch V"],
  beta: float,
) -> Float[Array, "*batch"]:
  """JSD_beta of GKD, Eq. 1 (arXiv 2306.13649), the convention of TRL.

  With M = beta teacher + (1 - beta) student:

    beta KL(teacher || M) + (1 - beta) KL(student || M)

  beta = 0 is KL(teacher || student) (forward) and beta = 1 is
  KL(student || teacher) (reverse), by definition and not as a limit: the
  formula itself goes to 0 at both ends, so beta = 0.001 is not close in scale
  to beta = 0.

  Raises:
    InputError: beta outside [0, 1].
  """
  if not 0 <= beta <= 1:
    raise InputError(f"beta must be in [0, 1], got {beta}")
  if beta == 0:
    return kl(teacher_logprobs, student_logprobs)
  if beta == 1:
    return kl(student_logprobs, teacher_logprobs)
  mixture = jnp.logaddexp(
    teacher_logprobs + math.log(beta), student_logprobs + math.log1p(-beta)
  )
  return beta * kl(teacher_logprobs, mixture) + (1 - beta) * kl(
    student_logprobs, mixture
  )


def entropy(logprobs: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
  """H(p) = -sum_v p_v log p_v."""
  return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
