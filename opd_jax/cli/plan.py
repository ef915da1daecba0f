"""`opd-jax plan`: whether a run fits devices that are not there."""

import os
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
from opd_jax.errors import InputError


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status, 1 if the run does not fit."""
  from absl import flags

  values = new()
  options: dict[str, Any] = {"flag_values": values}
  define_config(values)
  flags.DEFINE_string(
    "topology",
    None,
    "devices in place of the config's topology: GENERATION:SHAPE or Cloud "
    "TPU's name, such as v5p:4x4x4, v5e-16, 2*v6e:16x16; or GPUs, such as "
    "h100:8 or h200:2x8",
    **options,
  )
  flags.DEFINE_integer(
    "slices", None, "of that topology, joined by a slower network", **options
  )
  flags.DEFINE_boolean(
    "analytic",
    False,
    "count from shapes, at once and without the TPU compiler",
    **options,
  )
  flags.DEFINE_boolean(
    "remedies",
    True,
    "where it does not fit, look for changes with which it does, and compile "
    "them; --noremedies does not",
    **options,
  )
  flags.DEFINE_string("json", None, "file to write the figures to", **options)
  overrides, others = split_overrides(arguments)
  if not parse(values, "plan", others, required=("config",)):
    return 0
  if values.json:
    check_file("--json", values.json)
  # The compiler needs no accelerator, and takes none from a run.
  os.environ["JAX_PLATFORMS"] = "cpu"
  # What is compiled here never runs; its text is read, which a cache has not.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  from opd_jax import parsing
  from opd_jax.config import RunConfig

  location = values.config

  def load(more: Sequence[str]) -> RunConfig:
    return parsing.load(RunConfig, location, [*overrides, *more])

  if "teacher" not in parsing.read(location):
    raise InputError(
      f"{location} names no teacher, and plan is for the configs of train; "
      "give one of these, such as configs/pods/qwen3_1_7b_from_8b.py"
    )
  config = load(())
  name = values.topology or config.topology
  if name is None:
    raise InputError(
      f"{location} names no topology; give --topology, such as v5p:4x4x4, "
      "v5e-16 or h100:8"
    )
  from opd_jax.plan import planning, topology

  report = planning.plan(
    location,
    load,
    topology.parse(name, values.slices),
    analytic=values.analytic,
    with_remedies=values.remedies,
  )
  for line in report.lines():
    print(line)
  if values.json:
    write(values.json, report.figures())
  sys.stdout.flush()
  return 0 if report.fits else 1
