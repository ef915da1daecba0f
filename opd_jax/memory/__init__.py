"""What a step needs of each device's memory, counted before it has any.

Some of it is exact: arrays whose shapes and places are known before they exist.
The rest is what one compiled step holds while it runs, which the compiler
decides; it is estimated from the same shapes. Nothing is compiled.
"""

import dataclasses
from collections.abc import Collection, Iterable

import jax

from opd_jax.memory.drawing import Decoding, sampling
from opd_jax.memory.parts import (
  Part,
  Phase,
  frozen,
  itemsize,
  shard_bytes,
  size_text,
)
from opd_jax.memory.updating import update
from opd_jax.step import Step

__all__ = [
  "Decoding",
  "Estimate",
  "Part",
  "estimate",
  "shard_bytes",
  "size_text",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """The memory of a step.

  Attributes:
    parts: all that is counted.
    limit: bytes that the device offers; None where it does not say.
  """

  parts: tuple[Part, ...]
  limit: int | None

  @property
  def resident(self) -> int:
    """Bytes that are held from the first step to the last; exact."""
    return self._sum("always")

  @property
  def total(self) -> int:
    """Bytes at the fullest moment of a step; an estimate."""
    update = self._sum("update") + max(
      self._sum("frozen forward"),
      self._sum("vocabulary loop"),
      self._sum("backward pass"),
    )
    sampling = self._sum("sampling") + max(
      self._sum("prefill"), self._sum("decoding")
    )
    evaluation = self._sum("evaluation") + max(
      self._sum("evaluation prefill"), self._sum("evaluation decoding")
    )
    return self.resident + max(sampling, evaluation, update)

  def _sum(self, phase: Phase) -> int:
    return sum(part.size for part in self.parts if part.phase == phase)


def estimate(
  step: Step,
  prompts: int,
  window: int,
  teacher_window: int | None = None,
  evaluation: Decoding | None = None,
  shared: Collection[str] = (),
) -> Estimate:
  """Counts what one device holds during a step.

  Left out: the programs themselves, ids and masks, the weights of one layer
  while they are gathered, what the compiler keeps beyond the values that the
  backward pass needs, and what the runtime reserves.

  Args:
    step: of the run.
    prompts: per step, over all devices.
    window: P, slots of a prompt.
    teacher_window: slots of the teacher's prompts; None for the student's.
    evaluation: of the student, between steps.
    shared: frozen models that hold the arrays of another one.
  """
  rows = prompts * step.rollouts
  length = step.sampling.max_new_tokens
  # A row's prefix is its own, and the student reads it with the prompt.
  prefixes = step.mixing.prefix != "none"
  rollout = Decoding(
    prompts=rows if prefixes else prompts,
    rollouts=1 if prefixes else step.rollouts,
    window=window + length if prefixes else window,
    length=length,
  )
  parts = [
    *_weights(step, shared),
    *sampling(step, rollout, "sampling", ""),
    *update(step, rows, window, teacher_window or window),
  ]
  if evaluation is not None:
    parts += sampling(step, evaluation, "evaluation", "evaluation: ")
  return Estimate(parts=tuple(parts), limit=device_limit())


def device_limit() -> int | None:
  """Bytes that the first device offers; None where it does not say."""
  statistics = jax.local_devices()[0].memory_stats()
  return (statistics or {}).get("bytes_limit")


def _weights(step: Step, shared: Collection[str]) -> Iterable[Part]:
  state = step.abstract_state()
  student = step.scorer.student
  if student.lora is not None:
    yield Part(
      name="student weights",
      size=shard_bytes(student.abstract_held()),
      phase="always",
      exact=True,
      formula=f"parameters x {itemsize(student)} bytes, not trained",
    )
  yield Part(
    name="student weights" if student.lora is None else "adapters",
    size=shard_bytes(state.params),
    phase="always",
    exact=True,
    formula="parameters x 4 bytes, float32",
  )
  yield Part(
    name="optimizer state",
    size=shard_bytes((state.optimizer, state.objective, state.step)),
    phase="always",
    exact=True,
    formula="trained parameters x 2 moments x 4 bytes",
  )
  if step.replay is not None:
    yield Part(
      name="replay buffer",
      size=shard_bytes(state.replay),
      phase="always",
      exact=True,
      formula="rollout.replay_capacity x (prompt and completion) x 4 bytes",
    )
  for role, model in frozen(step).items():
    if role in shared:
      continue
    yield Part(
      name=f"{role} weights",
      size=shard_bytes(model.abstract_params(model.compute_dtype)),
      phase="always",
      exact=True,
      formula=f"parameters x {itemsize(model)} bytes"
      + (", kernels of layers x 1" if model.weight_dtype == "int8" else "")
      + (", kernels of layers on the host" if model.offload else ""),
    )
