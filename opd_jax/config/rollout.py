"""Keys of what a rollout is, beside how its tokens are drawn."""

import dataclasses

from opd_jax.config.checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
  """Who writes the completions; the default is the student alone.

  Attributes:
    teacher_mix: a in [0, 1): each token is drawn from a x teacher +
      (1 - a) x student, at the sampling temperature.
  """

  teacher_mix: float = 0.0

  def __post_init__(self):
    require(
      0 <= self.teacher_mix < 1,
      f"rollout.teacher_mix must be in [0, 1), got {self.teacher_mix}",
    )
