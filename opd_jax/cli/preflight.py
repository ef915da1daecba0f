"""`opd-jax preflight`: what may be wrong with a run, before it starts."""

import sys
from collections.abc import Sequence
from typing import Any

from opd_jax.cli.flags import check_file, experiment, new, write


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  from absl import flags

  values = new()
  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_boolean(
    "probe",
    True,
    "load the student and see whether it ends its completions",
    **options,
  )
  flags.DEFINE_string("json", None, "file to write the figures to", **options)
  from opd_jax.config import RunConfig

  config = experiment(values, "preflight", arguments, config_class=RunConfig)
  if config is None:
    return 0
  if values.json:
    check_file("--json", values.json)
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
