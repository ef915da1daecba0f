"""What the commands that train have in common."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from opd_jax.cli import distributed
from opd_jax.cli.flags import (
  check_folder,
  define_config,
  new,
  parse,
  split_overrides,
)


def run(
  command: str,
  arguments: Sequence[str],
  config_class: type,
  start: Callable[[Any, str], Any],
) -> int:
  """Runs an experiment from its config file; returns the exit status.

  Args:
    command: its name.
    arguments: of the command line.
    config_class: of its config.
    start: of the config and the workdir; returns a `summary.Summary`.
  """
  from absl import flags

  values = new()
  define_config(values)
  flags.DEFINE_string(
    "workdir",
    None,
    "folder of the run; a run begun there is resumed",
    flag_values=values,
  )
  distributed.define(values)
  overrides, others = split_overrides(arguments)
  if not parse(values, command, others, required=("config", "workdir")):
    return 0
  check_folder("--workdir", values.workdir, bucket=True)
  from opd_jax import parsing

  config = parsing.load(config_class, values.config, overrides)
  import jax

  with distributed.Joined(values):
    summary = start(config, values.workdir)
    if jax.process_index() == 0:
      _report(summary, config.steps)
  return 0 if summary.finished else 128 + summary.signal


def _report(summary: Any, steps: int) -> None:
  if not summary.finished:
    print(
      f"stopped after step {summary.step} of {steps}; the same command resumes",
      file=sys.stderr,
    )
    return
  for line in summary.lines():
    print(line)
