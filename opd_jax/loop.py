"""The loop of a run, whatever it trains on: resume, step, tell, save, export.

What `train` and `sft` differ in is a `task.Task`; see there.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console

from opd_jax import processes, storage
from opd_jax.checkpoint import Checkpoints
from opd_jax.errors import InputError
from opd_jax.export import export
from opd_jax.interrupts import Interrupts, Profiler
from opd_jax.meter import Meter
from opd_jax.metrics import LOGS, Progress, Writer
from opd_jax.models import Model
from opd_jax.sharding import slices_of
from opd_jax.spool import Spool
from opd_jax.summary import EXAMPLES, Summary
from opd_jax.task import Data, Measurement, Task

EXPORT_FOLDER = "export"
CHECKPOINT_FOLDER = "checkpoints"


def run(
  task: Task,
  data: Data,
  workdir: str | Path,
  *,
  measurements: Sequence[Measurement] = (),
  began: float,
) -> Summary:
  """Runs what is left of a run in its folder.

  Args:
    task: what is trained.
    data: on what.
    workdir: gets `metrics.jsonl`, `samples.jsonl`, `tensorboard/`,
      `checkpoints/`, `summary.json` and `export/`; a folder, or one of a
      bucket.
    measurements: of the weights.
    began: `time.monotonic()` when the run began.

  Raises:
    InputError: the folder is of another run; nothing was placed on a device.
    FloatingPointError: a metric is not finite.
  """
  config, root = task.config, storage.to_path(workdir)
  first_process = jax.process_index() == 0
  tell = rich.console.Console(
    stderr=True,
    highlight=False,
    markup=False,
    soft_wrap=True,
    quiet=not first_process,
  )
  with contextlib.ExitStack() as stack:
    checkpoints = Checkpoints(root / CHECKPOINT_FOLDER, config.checkpoint)
    stack.callback(checkpoints.close)
    checkpoints.save_manifest(task.kind, config)
    for line in task.describe():
      tell.print(line)

    # --- Weights, straight into their places. ---
    measured: dict[str, Any] = {
      "teacher": {},
      "before": {},
      "after": {},
      "examples_before": [],
      "examples_after": [],
    }
    spent = {"seconds": 0.0, "compile_seconds": 0.0}
    saved_step = checkpoints.latest()
    if saved_step is None:
      state = task.initial_state()
    else:
      place = checkpoints.read_place(saved_step)
      data.set_state(place["data"])
      task.set_state(place.get("task", {}))
      measured, spent = place["measured"], place["spent"]
      state, _ = checkpoints.restore(saved_step, task.abstract_state())
      tell.print(f"resuming after step {saved_step}")
    done = resumed = saved_step or 0
    interrupts = Interrupts()

    def spent_by_now() -> dict[str, float]:
      return {
        "seconds": spent["seconds"] + time.monotonic() - began,
        "compile_seconds": spent["compile_seconds"] + task.compile_seconds,
      }

    if done < config.steps:
      # --- Programs, before the first step. ---
      tell.print("compiling the step ...")
      task.compile(state)
      processes.meet()
      tell.print(f"compiled in {task.compile_seconds:.1f} s")

      # --- The loop. ---
      spool = Spool(root, LOGS if first_process else ())
      stack.enter_context(spool)
      writer = Writer(spool.folder, saved_step) if first_process else None
      progress = Progress(config.steps, start=done) if first_process else None
      for closing in (writer, progress):
        if closing is not None:
          stack.callback(closing.close)
      meter = Meter(task.work)

      def record(values: Mapping[str, float]) -> None:
        if writer is not None and progress is not None:
          writer.metrics(done, values)
          progress.update(done, values)
          spool.upload(wait=False)

      def measure(everything: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for measurement in measurements:
          if everything or _due(measurement.every, done):
            with meter.paused():
              values = measurement(task.weights(state))
              record(values)
            found |= values
            # At once: what is measured next may fail, and end the run.
            measured["after"] |= values
            task.observe(done, values)
        examples = [
          example
          for measurement in measurements
          for example in measurement.examples(EXAMPLES)
        ]
        measured["examples_after"] = examples
        if done == 0:
          measured["before"] |= found
          measured["examples_before"] = examples
        return found

      def save(values: Mapping[str, float]) -> None:
        if meter.steps:
          record(meter.close(done))
        with meter.paused():
          # Before the checkpoint: a log may be ahead of it, never behind.
          spool.upload()
          place = {
            "data": data.get_state(),
            "task": task.get_state(),
            "measured": measured,
            "spent": spent_by_now(),
          }
          checkpoints.save(done, state, place, values)

      def rescue() -> None:
        """Saves the steps done before an error that the user can mend."""
        save({})
        checkpoints.wait()
        tell.print(f"saved step {done}; the same command resumes after it")

      if done == 0:
        measured["teacher"] = dict(task.baseline())
        record(measured["teacher"])
        measure(everything=True)
      stack.enter_context(interrupts)
      profiler = stack.enter_context(
        Profiler(config.log.profile_steps, spool.folder / "profile")
      )
      values: Mapping[str, float] = {}
      while done < config.steps and not interrupts.stop(done):
        place = data.get_state()
        batch = next(data)
        if _due(config.log.time_split_every, done):
          with meter.paused():
            meter.split = task.time_split(state, batch)
        profiler.before(done, state)
        try:
          state, metrics, shown = task.step(state, batch)
        except InputError:
          # Such as a verifier that cannot bear a completion, before the update.
          data.set_state(place)
          if saved_step != done and done > 0:
            rescue()
          raise
        done += 1
        meter.add(metrics)

        last = done == config.steps
        if last or _due(config.log.every, done):
          record(meter.close(done))
        if writer is not None and (last or _due(config.log.sample_every, done)):
          with meter.paused():
            writer.samples(done, task.samples(shown))
        saving = last or _due(config.checkpoint.every, done)
        try:
          values = measure(everything=saving)
        except InputError:
          rescue()
          raise
        best = config.checkpoint.keep_best and checkpoints.improves(values)
        if saving or best:
          save(values)
          saved_step = done
      if saved_step != done:
        save(values)

    # --- What the user takes away. ---
    checkpoints.wait()
    finished = done == config.steps
    folder = root / EXPORT_FOLDER
    if finished:
      export(
        task.weights(state),
        task.student,
        config.student.path,
        folder,
        replace=True,
      )
  if resumed != config.steps:
    spent = spent_by_now()
  summary = Summary(
    step=done,
    signal=None if finished else interrupts.signal,
    samples=config.eval.samples,
    **measured,
    seconds=spent["seconds"],
    compile_seconds=spent["compile_seconds"],
    export=str(folder) if finished else None,
  )
  if first_process:
    text = json.dumps(summary.to_json(), indent=2)
    (root / "summary.json").write_text(text + "\n")
  return summary


def devices(student: Model) -> str:
  """The devices of a run, in words."""
  mesh = student.layout.mesh
  sizes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
  slices = len(slices_of(list(mesh.devices.flat)))
  return (
    f"devices: {mesh.size} x {jax.devices()[0].device_kind}"
    f"{f' in {slices} slices' if slices > 1 else ''}"
    f"{': ' + ' x '.join(sizes) if sizes else ''}"
  )


def _due(every: int | None, done: int) -> bool:
  return every is not None and done % every == 0
