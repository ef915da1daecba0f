"""What a run is made of: frozen dataclasses, filled once by `parsing.py`.

A value out of range raises `InputError` with the dotted name of its key, before
anything touches a device. `None` means off.
"""

from opd_jax.config.checks import require
from opd_jax.config.data import (
  DataConfig,
  SftDataConfig,
  SourceConfig,
  TemplateConfig,
)
from opd_jax.config.measure import (
  EvalConfig,
  HeldOutConfig,
  RewardConfig,
)
from opd_jax.config.rollout import RolloutConfig
from opd_jax.config.run import (
  CheckpointConfig,
  LogConfig,
  PreflightConfig,
  RunConfig,
  SftConfig,
)
from opd_jax.config.selection import SelectionConfig
from opd_jax.config.step import (
  BatchConfig,
  FrozenModelSource,
  LoraConfig,
  MeshConfig,
  ModelSource,
  OptimizerConfig,
  PackedBatchConfig,
  SamplingConfig,
  SftStudentSource,
  TrainedModelSource,
)

__all__ = [
  "BatchConfig",
  "CheckpointConfig",
  "DataConfig",
  "EvalConfig",
  "FrozenModelSource",
  "HeldOutConfig",
  "LogConfig",
  "LoraConfig",
  "MeshConfig",
  "ModelSource",
  "OptimizerConfig",
  "PackedBatchConfig",
  "PreflightConfig",
  "RewardConfig",
  "RolloutConfig",
  "RunConfig",
  "SamplingConfig",
  "SelectionConfig",
  "SftConfig",
  "SftDataConfig",
  "SftStudentSource",
  "SourceConfig",
  "TemplateConfig",
  "TrainedModelSource",
  "require",
]
