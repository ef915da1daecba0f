"""A Hugging Face checkpoint from the folder of a run."""

from pathlib import Path

import jax

from opd_jax import objectives, optim, sft
from opd_jax.checkpoint import Checkpoints
from opd_jax.config import RunConfig, SftConfig
from opd_jax.errors import InputError
from opd_jax.export import check_free, export
from opd_jax.loop import CHECKPOINT_FOLDER
from opd_jax.models import Model, hf
from opd_jax.parsing import parse
from opd_jax.sharding import TRAIN_RULES, Layout, make_mesh
from opd_jax.update import abstract_state


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
  checkpoints = Checkpoints(Path(workdir) / CHECKPOINT_FOLDER, None)
  manifest = checkpoints.read_manifest()
  if manifest.kind == "sft":
    config = parse(SftConfig, manifest.config)
    objective = sft.OBJECTIVE
  else:
    config = parse(RunConfig, manifest.config)
    objective = objectives.create(config.objective)
  number = _step_number(checkpoints, step)
  mesh = make_mesh({}, jax.devices("cpu")[:1])
  student = Model(
    hf.read_config(config.student.path), Layout.create(mesh, TRAIN_RULES)
  )
  state, _ = checkpoints.restore(
    number,
    abstract_state(
      student,
      optim.build(config.optimizer, config.steps),
      objective,
    ),
  )
  checkpoints.close()
  export(state.params, student, config.student.path, out, dtype)
  return int(state.step)


def _step_number(checkpoints: Checkpoints, step: str) -> int | None:
  if step == "latest":
    return checkpoints.latest()
  if step == "best":
    best = checkpoints.best()
    if best is None:
      raise InputError(
        "no checkpoint of this run has an accuracy or a held-out loss, so none "
        "is the best; set eval.source or held_out.path in its config, or "
        "export --step=latest"
      )
    return best
  if not step.isdecimal():
    raise InputError(f"step must be latest, best or a number, got {step!r}")
  return int(step)
