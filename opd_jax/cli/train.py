"""`opd-jax train`: distil a student."""

import signal
import sys
from collections.abc import Sequence
from typing import Any

from opd_jax.cli.flags import check_folder, new, parse


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  from absl import flags

  values = new()
  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string(
    "config",
    None,
    "experiment: FILE.py, or FILE.py:ARG for get_config(ARG); "
    "--config.KEY=VALUE sets one of its keys, such as "
    "--config.optimizer.learning_rate=1e-5",
    **options,
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "folder of the run; a run begun there is resumed",
    **options,
  )
  flags.DEFINE_boolean(
    "distributed",
    False,
    "this is one process of many: find the others with jax.distributed",
    **options,
  )
  overrides = [a for a in arguments if a.startswith("--config.")]
  others = [a for a in arguments if a not in overrides]
  if not parse(values, "train", others, required=("config", "workdir")):
    return 0
  check_folder("--workdir", values.workdir)
  from opd_jax import parsing
  from opd_jax.config import RunConfig

  config = parsing.load(
    RunConfig,
    values.config,
    [override.removeprefix("--config.") for override in overrides],
  )
  import jax

  if values.distributed:
    jax.distributed.initialize()
  from opd_jax import train

  summary = train.train(config, values.workdir)
  if jax.process_index() == 0:
    _report(summary, config.steps)
  return 0 if summary.finished else 128 + signal.SIGTERM


def _report(summary: Any, steps: int) -> None:
  if not summary.finished:
    print(
      f"stopped after step {summary.step} of {steps}; the same command resumes",
      file=sys.stderr,
    )
    return
  if summary.loss_before is not None:
    print(
      f"held-out loss {summary.loss_before:.4f} -> {summary.loss_after:.4f} "
      "nats per token"
    )
  print(
    f"{summary.step} steps in {summary.seconds:.0f} s, "
    f"{summary.compile_seconds:.0f} s of them compiling"
  )
  print(f"Hugging Face checkpoint: {summary.export}")
