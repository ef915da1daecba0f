"""`opd-jax preflight`: what may be wrong with a run, before it starts."""

import sys
from collections.abc import Sequence
from typing import Any

from opd_jax.cli.flags import (
  check_file,
  define_config,
  new,
  parse,
  split_overrides,
  write,
)


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  from absl import flags

  values = new()
  options: dict[str, Any] = {"flag_values": values}
  define_config(values)
  flags.DEFINE_boolean(
    "probe",
    True,
    "load the student and see whether it ends its completions",
    **options,
  )
  flags.DEFINE_string("json", None, "file to write the figures to", **options)
  overrides, others = split_overrides(arguments)
  if not parse(values, "preflight", others, required=("config",)):
    return 0
  if values.json:
    check_file("--json", values.json)
  from opd_jax import parsing
  from opd_jax.config import RunConfig

  config = parsing.load(RunConfig, values.config, overrides)
  from opd_jax import preflight, setup

  prepared = setup.prepare(config)
  report = preflight.inspect(
    prepared, setup.make_step(prepared), with_probe=values.probe
  )
  for line in report.lines():
    print(line)
  if values.json:
    write(values.json, report.figures())
  sys.stdout.flush()
  report.enforce()
  return 0
