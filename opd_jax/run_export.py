"""A Hugging Face checkpoint from the folder of a run."""

from pathlib import Path

from opd_jax import saved
from opd_jax.export import check_free, export


def export_run(
  workdir: str | Path,
  out: str | Path,
  *,
  step: str = "latest",
  dtype: str = "float32",
) -> int:
  """Writes the student of one of a run's checkpoints; see `export.export`.

  The weights pass through the host's memory, so the devices of the run are not
  needed.

  Args:
    workdir: of the run.
    out: folder to write.
    step: "latest", "best" (by accuracy or held-out loss) or a number.
    dtype: of the written weights.

  Returns:
    The step that was written.

  Raises:
    InputError: no such run or step, or `out` is in use.
  """
  check_free(out)
  found = saved.find_run(workdir, step)
  student, state = found.restore()
  export(state.params, student, found.source, out, dtype)
  return int(state.step)
