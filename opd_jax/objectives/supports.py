"""The part of the vocabulary that a divergence looks at, and what is left.

A support S is chosen position by position:

  vocabulary     all columns
  teacher_top_k  the teacher's K likeliest
  student_top_k  the student's K likeliest; the choice carries no gradient
  union          both, each column once: K to 2 K columns

Ties go to the lowest id. Off the whole vocabulary the models have a mass
outside S as well, and the normalisation says what becomes of it:

  tail                  one more column per model, with the mass outside S. Both
                        still sum to 1, and the divergence is at most that of
                        the whole vocabulary and grows with K
  renormalized          both divided by their mass on S. Blind to that mass: the
                        value is 0 for a student that has the teacher's shape on
                        S and next to nothing there. Refused for K = 1, where
                        both distributions are one column of mass 1
  teacher_renormalized  the teacher divided by its mass on S, the student as it
                        is
  none                  both as they are; the value may be negative, and nothing
                        is clamped

The last two leave the student a distribution that does not sum to 1. A
divergence that falls when its mass leaves S, as reverse KL does, is refused
with them.

Source: "tail" is that of TRL's server distillation, "renormalized" of NeMo-RL
and ms-swift, "teacher_renormalized" of EOPD, "none" of verl and TrOPD.

Differs: the tail is summed over the columns outside, where TRL takes 1 - the
sum inside, held at least 1e-7: below that its gradient is 0. verl clamps the
value of "none" at 0, which removes the gradient there. NeMo-RL's reverse KL
with log teacher = -100 outside S is not offered.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opd_jax.errors import InputError
from opd_jax.objectives.base import Term
from opd_jax.objectives.divergences import Divergence
from opd_jax.types import MASKED_LOGPROB

SupportName = Literal["vocabulary", "teacher_top_k", "student_top_k", "union"]
Normalization = Literal["tail", "renormalized", "teacher_renormalized", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Support:
  """A support by name.

  Attributes:
    name: see the module.
    top_k: K; None for the whole vocabulary.
    normalization: see the module; None for the whole vocabulary.
    whole: the option that stands for the whole vocabulary where the support is
      chosen, for messages; None if there is none.
  """

  name: SupportName = "vocabulary"
  top_k: int | None = None
  normalization: Normalization | None = None
  whole: str | None = "support='vocabulary'"

  def __post_init__(self):
    if self.name == "vocabulary":
      for key in ("top_k", "normalization"):
        if getattr(self, key) is not None:
          raise InputError(
            f"{key} = {getattr(self, key)!r} has no meaning over the whole "
            "vocabulary; leave it out, or set support to teacher_top_k, "
            "student_top_k or union"
          )
      return
    if self.top_k is None or self.top_k < 1:
      raise InputError(
        f"support {self.name!r} needs top_k >= 1, the number of ids, got "
        f"{self.top_k}; {self._remedy}"
      )
    if self.normalization is None:
      raise InputError(
        f"support {self.name!r} needs a normalization, which says what becomes "
        "of the mass outside: tail, renormalized, teacher_renormalized or none"
      )
    if self.top_k == 1 and self.normalization == "renormalized":
      raise InputError(
        "top_k = 1 with normalization='renormalized' compares two "
        "distributions of one id with mass 1: the divergence is 0 whatever the "
        "student; take normalization='tail', or a larger top_k"
      )

  def check(self, divergence: Divergence) -> None:
    """Raises InputError where the divergence would empty the support."""
    open_ended = ("teacher_renormalized", "none")
    if divergence.sheds_mass and self.normalization in open_ended:
      raise InputError(
        f"divergence {divergence.name!r} falls as the student's mass leaves "
        f"the support, which normalization={self.normalization!r} does not "
        "count; take normalization='tail'"
      )

  def check_vocabulary(self, vocab_size: int) -> None:
    """Raises InputError if there are fewer ids than K."""
    if self.top_k is not None and self.top_k > vocab_size:
      raise InputError(
        f"top_k must be in [1, V={vocab_size}], got {self.top_k}; "
        f"{self._remedy}"
      )

  @property
  def _remedy(self) -> str:
    if self.whole is None:
      return "set it to some of the ids that all models share"
    return f"set {self.whole} for all"

  def columns(
    self,
    student_logprobs: Float[Array, "*batch V"],
    teacher_logprobs: Float[Array, "*batch V"],
  ) -> Bool[Array, "*batch V"]:
    """Which columns are in S; a choice, without gradient."""
    if self.top_k is None:
      return jnp.ones(student_logprobs.shape, bool)
    if self.name == "teacher_top_k":
      return top_k_columns(teacher_logprobs, self.top_k)
    if self.name == "student_top_k":
      return top_k_columns(student_logprobs, self.top_k)
    return top_k_columns(teacher_logprobs, self.top_k) | top_k_columns(
      student_logprobs, self.top_k
    )

  def divergence(
    self,
    divergence: Divergence,
    student_logprobs: Float[Array, "*batch V"],
    teacher_logprobs: Float[Array, "*batch V"],
  ) -> Float[Array, "*batch"]:
    """The divergence of the models as they are on S, nats per position.

    Gradient flows into whatever argument carries it, through the normalisation
    too.
    """
    if self.top_k is None:
      return divergence(student_logprobs, teacher_logprobs)
    inside = self.columns(student_logprobs, teacher_logprobs)
    student = _keep(inside, student_logprobs)
    teacher = _keep(inside, teacher_logprobs)
    if self.normalization == "tail":
      # A divergence is a sum over columns: the tail is one more.
      outside = ~inside
      return divergence(student, teacher) + divergence(
        _mass(outside, student_logprobs), _mass(outside, teacher_logprobs)
      )
    if self.normalization in ("renormalized", "teacher_renormalized"):
      teacher = _keep(inside, teacher - _mass(inside, teacher_logprobs))
    if self.normalization == "renormalized":
      student = _keep(inside, student - _mass(inside, student_logprobs))
    return divergence(student, teacher)

  def statistics(
    self,
    student_logprobs: Float[Array, "*batch V"],
    teacher_logprobs: Float[Array, "*batch V"],
  ) -> dict[str, Term]:
    """The share of each model that lies on S; none for all the vocabulary."""
    if self.top_k is None:
      return {}
    inside = self.columns(student_logprobs, teacher_logprobs)
    return {
      f"{name}_mass": Term(jnp.exp(_mass(inside, logprobs))[..., 0])
      for name, logprobs in (
        ("student", student_logprobs),
        ("teacher", teacher_logprobs),
      )
    }


def top_k_columns(
  logprobs: Float[Array, "*batch V"], top_k: int
) -> Bool[Array, "*batch V"]:
  """The K largest columns; ties go to the lowest ids."""
  # The ids only: with a look at the values XLA sorts the whole vocabulary.
  _, ids = jax.lax.top_k(jax.lax.stop_gradient(logprobs), top_k)
  return jnp.put_along_axis(
    jnp.zeros(logprobs.shape, bool), ids, True, axis=-1, inplace=False
  )


def _keep(
  inside: Bool[Array, "*batch V"], logprobs: Float[Array, "*batch V"]
) -> Float[Array, "*batch V"]:
  return jnp.where(inside, logprobs, jnp.full_like(logprobs, MASKED_LOGPROB))


def _mass(
  inside: Bool[Array, "*batch V"], logprobs: Float[Array, "*batch V"]
) -> Float[Array, "*batch 1"]:
  """Log of the mass on some columns, summed there and not as 1 - the rest."""
  return jax.nn.logsumexp(_keep(inside, logprobs), axis=-1, keepdims=True)
