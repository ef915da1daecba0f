"""`opd-jax train`: fine-tune on given completions."""

from collections.abc import Sequence
from typing import Any

from opd_jax.cli import runs


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  from opd_jax.config import SftConfig

  return runs.run("sft", arguments, SftConfig, _start)


def _start(config: Any, workdir: str) -> Any:
  from opd_jax import sft

  return sft.sft(config, workdir)
