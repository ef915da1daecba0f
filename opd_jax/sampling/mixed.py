"""Decoding from a mixture of student and teacher.

  p(token) = a teacher(token) + (1 - a) student(token)

at every position, both at the sampling temperature and over the ids they share.
Each model keeps a cache of its own; the tokens are the same in both.

Source: teacher-mixed sampling of MiniLLM, arXiv 2306.08543, Sec. 2.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opd_jax.sampling.sampler import Cache, Decoder
from opd_jax.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedCache:
  """What both models remember of the tokens so far."""

  student: Cache
  teacher: Cache

  def repeat(self, n: int) -> "MixedCache":
    """Every row n times, in both."""
    return MixedCache(
      student=self.student.repeat(n), teacher=self.teacher.repeat(n)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedDecoder:
  """A decoder made of two; its weights are {"student": ..., "teacher": ...}.

  Attributes:
    student: drawn from with weight 1 - a.
    teacher: drawn from with weight a.
    teacher_mix: a, in [0, 1).
    temperature: of the draw, > 0.
    vocab_size: ids that both models have.
  """

  student: Decoder
  teacher: Decoder
  teacher_mix: float
  temperature: float
  vocab_size: int

  def prefill(
    self,
    params: Mapping[str, Params],
    tokens: Int[Array, "B P"],
    positions: Int[Array, "B P"],
    slots: int,
  ) -> tuple[Mapping[str, Float[Array, "B _"]], MixedCache]:
    """Both models' last hidden states by role, and their caches."""
    student, student_cache = self.student.prefill(
      params["student"], tokens, positions, slots
    )
    teacher, teacher_cache = self.teacher.prefill(
      params["teacher"], tokens, positions, slots
    )
    cache = MixedCache(student=student_cache, teacher=teacher_cache)
    return {"student": student, "teacher": teacher}, cache

  def decode(
    self,
    params: Mapping[str, Params],
    cache: MixedCache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    slot: Int[Array, ""],
  ) -> tuple[Mapping[str, Float[Array, "B _"]], MixedCache]:
    """Both models' hidden states of one more token per row."""
    student, student_cache = self.student.decode(
      params["student"], cache.student, tokens, positions, slot
    )
    teacher, teacher_cache = self.teacher.decode(
      params["teacher"], cache.teacher, tokens, positions, slot
    )
    cache = MixedCache(student=student_cache, teacher=teacher_cache)
    return {"student": student, "teacher": teacher}, cache

  def logits(
    self, params: Mapping[str, Params], hidden: Mapping[str, Any]
  ) -> Float[Array, "*B V"]:
    """Log p times the temperature: the draw divides by it again."""
    both = {
      "student": self.student.logits(params["student"], hidden["student"]),
      "teacher": self.teacher.logits(params["teacher"], hidden["teacher"]),
    }
    width = min(logits.shape[-1] for logits in both.values())
    shared = jnp.arange(width) < self.vocab_size
    logprobs = {
      role: jax.nn.log_softmax(
        jnp.where(shared, logits[..., :width] / self.temperature, -jnp.inf)
      )
      for role, logits in both.items()
    }
    mixture = jnp.logaddexp(
      logprobs["student"] + jnp.log1p(-self.teacher_mix),
      logprobs["teacher"] + jnp.log(self.teacher_mix),
    )
    return self.temperature * mixture
