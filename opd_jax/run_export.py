"""A Hugging Face checkpoint, or an adapter, from the folder of a run."""

from pathlib import Path
from typing import Literal

from opd_jax import saved
from opd_jax.export import check_free, export, export_adapter


def export_run(
  workdir: str | Path,
  out: str | Path,
  *,
  step: str = "latest",
  dtype: str = "float32",
  format: Literal["merged", "adapter"] = "merged",
) -> int:
  """Writes the student of one of a run's checkpoints; see `export`.

  The weights pass through the host's memory, so the devices of the run are not
  needed.

  Args:
    workdir: of the run.
    out: folder to write.
    step: "latest", "best" (by accuracy or held-out loss) or a number.
    dtype: of the written weights.
    format: "merged" writes the whole model; "adapter" what was trained of it,
      for PEFT, in a run with `student.lora`.

  Returns:
    The step that was written.

  Raises:
    InputError: no such run or step, `out` is in use, or no adapter in the run.
  """
  check_free(out)
  found = saved.find_run(workdir, step)
  student, state = found.restore()
  if format == "adapter":
    export_adapter(state.params, student, found.source, out, dtype)
  else:
    weights = found.weights(student, state)
    export(weights, student, found.source, out, dtype)
  return int(state.step)
