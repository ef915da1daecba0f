"""`opd-jax export`: a checkpoint of a run as a Hugging Face model."""

import os
from collections.abc import Sequence
from typing import Any

from opd_jax.cli.flags import check_folder, new, parse


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  from absl import flags

  values = new()
  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string("workdir", None, "folder of the run", **options)
  flags.DEFINE_string(
    "out", None, "folder to write; must not exist, or be empty", **options
  )
  flags.DEFINE_string("step", "latest", "latest, best or a step", **options)
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the weights", **options
  )
  flags.DEFINE_enum(
    "format",
    "merged",
    ["merged", "adapter"],
    "the whole model, or what a run with student.lora trained, for PEFT",
    **options,
  )
  if not parse(values, "export", arguments, required=("workdir", "out")):
    return 0
  check_folder("--out", values.out, bucket=True)
  # The accelerators stay free for a run that may be using them.
  os.environ["JAX_PLATFORMS"] = "cpu"
  from opd_jax import run_export

  step = run_export.export_run(
    values.workdir,
    values.out,
    step=values.step,
    dtype=values.dtype,
    format=values.format,
  )
  print(f"wrote step {step} to {values.out}")
  return 0
