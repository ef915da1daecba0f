"""Keys of who writes a completion, besides the student."""

import dataclasses
from typing import Literal

from opd_jax.config.checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
  """Who writes the completions; the default is the student alone.

  Given tokens come from the sources that are `given`.

  Attributes:
    teacher_mix: a in [0, 1): each token is drawn from a x teacher +
      (1 - a) x student, at the sampling temperature.
    stored_fraction: share of completions that are taken from a store as a
      whole: 1 - lambda of GKD; 0 draws all, 1 draws none.
    stored_scope: what is decided at once: each row, or all rows of a step (as
      TRL does).
    prefix: "cosine" begins every other completion with stored tokens, at most
      T (1 + cos(pi step / steps)) / 2 of them (TrOPD), T being
      sampling.max_new_tokens; "none" with none.
    prefix_draw: "max" takes as many as that and the stored completion allow,
      "uniform" a number from 0 to that.
    replay_capacity: completions of the student that are kept to be trained on
      again (DistiLLM); None for off. Each step then draws, replays or takes
      stored completions as a whole.
    replay_threshold: of DistiLLM at the start, in [0, 1]: the probability that
      a step does not take stored completions.
    replay_raise: what it gains each time the held-out loss has risen.
    replay_rise: nats per token that the held-out loss must have risen by, since
      the start or since the last gain.
  """

  teacher_mix: float = 0.0
  stored_fraction: float = 0.0
  stored_scope: Literal["row", "step"] = "row"
  prefix: Literal["none", "cosine"] = "none"
  prefix_draw: Literal["max", "uniform"] = "max"
  replay_capacity: int | None = None
  replay_threshold: float = 0.0
  replay_raise: float = 0.1
  replay_rise: float = 0.1

  @property
  def reads_given(self) -> bool:
    """Whether any completion may hold given tokens."""
    return (
      self.stored_fraction > 0
      or self.prefix != "none"
      or self.replay_capacity is not None
    )

  def __post_init__(self):
    require(
      0 <= self.teacher_mix < 1,
      f"rollout.teacher_mix must be in [0, 1), got {self.teacher_mix}",
    )
    for name in ("stored_fraction", "replay_threshold", "replay_raise"):
      value = getattr(self, name)
      require(0 <= value <= 1, f"rollout.{name} must be in [0, 1], got {value}")
    require(
      self.replay_rise > 0,
      f"rollout.replay_rise must be > 0, got {self.replay_rise}",
    )
    capacity = self.replay_capacity
    for names, read, remedy in (
      (
        ("replay_threshold", "replay_raise", "replay_rise"),
        capacity is not None,
        "set rollout.replay_capacity",
      ),
      (("stored_scope",), self.stored_fraction > 0, "set stored_fraction > 0"),
      (
        ("prefix_draw",),
        self.prefix != "none",
        'set rollout.prefix to "cosine"',
      ),
      (
        ("prefix",),
        self.stored_fraction < 1,
        "set stored_fraction, with which every completion is whole, below 1",
      ),
    ):
      for name in names:
        value = getattr(self, name)
        require(
          read or value == getattr(RolloutConfig, name),
          f"rollout.{name} = {value!r} has no effect here; leave it out, or "
          f"{remedy}",
        )
    if capacity is None:
      return
    require(
      capacity >= 1,
      f"rollout.replay_capacity must be >= 1, got {capacity}; None for off",
    )
    require(
      self.stored_fraction == 0 and self.prefix == "none",
      "with rollout.replay_capacity a step is drawn, replayed or stored as a "
      f"whole; leave out rollout.stored_fraction = {self.stored_fraction} and "
      f"rollout.prefix = {self.prefix!r}",
    )
