"""A whole run, and how it is saved and told."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from opd_jax.config.checks import require
from opd_jax.config.data import DataConfig, SftDataConfig
from opd_jax.config.measure import EvalConfig, HeldOutConfig, RewardConfig
from opd_jax.config.rollout import RolloutConfig
from opd_jax.config.selection import SelectionConfig
from opd_jax.config.step import (
  BatchConfig,
  FrozenModelSource,
  MeshConfig,
  OptimizerConfig,
  PackedBatchConfig,
  SamplingConfig,
  SftStudentSource,
  TrainedModelSource,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When states are saved, and which are kept.

  Attributes:
    every: steps between checkpoints; the end, SIGTERM and Ctrl-C always save
      one.
    keep_latest: the newest n stay.
    keep_best: also the best by accuracy of the evaluation, or by held-out loss
      where there is no evaluation; saved whenever one is measured.
  """

  every: int = 100
  keep_latest: int = 2
  keep_best: bool = True

  def __post_init__(self):
    for name in ("every", "keep_latest"):
      value = getattr(self, name)
      require(value >= 1, f"checkpoint.{name} must be >= 1, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  """What a run tells.

  Attributes:
    every: steps between metric records; the device is not waited for between.
    sample_every: steps between decoded samples in the log.
    samples: completions shown each time.
    time_split_every: steps between measurements of the time that sampling and
      teacher scoring take, each run once more as a program of its own; None
      for never, which saves compiling them. `sft` has neither.
    profile_steps: (first, last) step of a profiler trace; None for off.
  """

  every: int = 10
  sample_every: int = 50
  samples: int = 2
  time_split_every: int | None = 100
  profile_steps: tuple[int, ...] | None = None

  def __post_init__(self):
    for name in ("every", "sample_every", "time_split_every"):
      value = getattr(self, name)
      require(
        value is None or value >= 1, f"log.{name} must be >= 1, got {value}"
      )
    require(self.samples >= 0, f"log.samples must be >= 0, got {self.samples}")
    steps = self.profile_steps
    require(
      steps is None or (len(steps) == 2 and 0 <= steps[0] <= steps[1]),
      f"log.profile_steps must be (first, last) or None, got {steps}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreflightConfig:
  """What is looked at before anything is placed on a device.

  Attributes:
    allow: names of errors to go on with.
  """

  allow: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """One experiment.

  Attributes:
    student: is trained; float32 master weights, exported at the end.
    teacher: frozen; scores the rows of all sources without one of their own.
    domain_teachers: by the name of a data source: the teacher of its rows.
    reference: a second frozen model, for the objectives that need one, and None
      for the others.
    data: the prompts.
    sampling: how the student draws.
    rollout: who writes the completions.
    batch: rows per step, and updates.
    reward: what is right, for the objectives that learn from it, and None for
      the others.
    objective: `name` of an objective, and its own options.
    selection: which tokens carry loss; None for all.
    optimizer: how the gradient is applied.
    mesh: how many devices each parallel axis has.
    topology: devices that the run is meant for, such as "v5p:4x4x4", "v5e-16"
      or "h100:8"; `plan` reads it, and nothing else does.
    held_out: the loss on held-out texts.
    eval: the accuracy of sampled answers.
    preflight: what is looked at before the run.
    checkpoint: what is saved.
    log: what is told.
    steps: rollout batches to learn from, which are the updates to make unless
      `batch` asks for several per rollout batch.
    seed: of the data order and of every draw.
    mode: "fused" runs rollout, scoring and update as one program; "split" as
      two with the host between them. Tokens and weights are the same. None
      takes "fused", or "split" for an objective that needs the host.
  """

  student: TrainedModelSource
  teacher: FrozenModelSource
  domain_teachers: Mapping[str, FrozenModelSource] = dataclasses.field(
    default_factory=dict
  )
  reference: FrozenModelSource | None = None
  data: DataConfig
  sampling: SamplingConfig = SamplingConfig()
  rollout: RolloutConfig = RolloutConfig()
  batch: BatchConfig = BatchConfig()
  reward: RewardConfig | None = None
  objective: Mapping[str, Any]
  selection: SelectionConfig | None = None
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  topology: str | None = None
  held_out: HeldOutConfig = HeldOutConfig()
  eval: EvalConfig = EvalConfig()
  preflight: PreflightConfig = PreflightConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  steps: int
  seed: int = 0
  mode: Literal["fused", "split"] | None = None

  def __post_init__(self):
    require(self.steps >= 1, f"steps must be >= 1, got {self.steps}")
    require(
      self.rollout.teacher_mix == 0 or self.sampling.temperature > 0,
      f"rollout.teacher_mix = {self.rollout.teacher_mix} needs "
      "sampling.temperature > 0: a mixture is drawn from, and greedy decoding "
      "draws nothing; set the temperature, or leave teacher_mix out",
    )
    require(
      0 <= self.seed < 2**31, f"seed must be in [0, 2**31), got {self.seed}"
    )
    require(
      isinstance(self.objective.get("name"), str),
      "objective.name must name an objective, got "
      f"{self.objective.get('name')!r}",
    )
    for key, draws in (
      ("rollout.teacher_mix", self.rollout.teacher_mix > 0),
      ("eval.teacher", self.eval.source is not None and self.eval.teacher),
    ):
      require(
        not (self.teacher.offload and draws),
        f"teacher.offload = True, and {key} draws tokens from the teacher, for "
        "which its layers would come to the device once per token; leave out "
        "one of the two",
      )
    names = list(self.data.sources)
    for name in self.domain_teachers:
      require(
        name in names,
        f"domain_teachers.{name} is for the rows of data.sources.{name}, which "
        f"there is not; the sources are {', '.join(names)}",
      )
    require(
      any(
        self.domain_teachers.get(name, self.teacher) == self.teacher
        for name in names
      ),
      f"teacher.path = {self.teacher.path!r} would score no row: "
      "domain_teachers has another one for every source; make teacher one of "
      "them, whose own entry may then be left out",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
  """One supervised fine-tuning.

  Attributes:
    student: is trained; float32 master weights, exported at the end.
    data: the examples: `completion` after `prompt`.
    batch: packed rows per step.
    optimizer: how the gradient is applied.
    mesh: how many devices each parallel axis has.
    held_out: the loss on held-out texts.
    eval: the accuracy of sampled answers.
    preflight: what is looked at before the run.
    checkpoint: what is saved.
    log: what is told.
    steps: updates to make.
    seed: of the data order, of random weights and of every draw.
  """

  student: SftStudentSource
  data: SftDataConfig
  batch: PackedBatchConfig = PackedBatchConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  held_out: HeldOutConfig = HeldOutConfig()
  eval: EvalConfig = EvalConfig()
  preflight: PreflightConfig = PreflightConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  steps: int
  seed: int = 0

  def __post_init__(self):
    require(self.steps >= 1, f"steps must be >= 1, got {self.steps}")
    require(
      0 <= self.seed < 2**31, f"seed must be in [0, 2**31), got {self.seed}"
    )
