"""`opd-jax train`: distil a student."""

from collections.abc import Sequence
from typing import Any

from opd_jax.cli import runs


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  from opd_jax.config import RunConfig

  return runs.run("train", arguments, RunConfig, _start)


def _start(config: Any, workdir: str) -> Any:
  from opd_jax import train

  return train.train(config, workdir)
