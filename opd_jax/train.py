"""The training loop: check, place, compile, step, tell, save, export."""

import contextlib
import dataclasses
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from jax.experimental import multihost_utils

from opd_jax import held_out as held_out_lib
from opd_jax import setup as setup_lib
from opd_jax.checkpoint import BEST_METRIC, Checkpoints
from opd_jax.config import RunConfig
from opd_jax.data.prompts import Batch, Tokens
from opd_jax.export import export
from opd_jax.meter import Meter
from opd_jax.metrics import Progress, Writer
from opd_jax.models import hf
from opd_jax.programs import Programs
from opd_jax.setup import Setup
from opd_jax.sharding import Layout
from opd_jax.step import Step
from opd_jax.types import (
  STOP_ID,
  Params,
  PromptBatch,
  Rollout,
  StepInputs,
  TrainState,
)

EXPORT_FOLDER = "export"
CHECKPOINT_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """What a run ends with; also `summary.json` in its folder.

  Attributes:
    step: updates done.
    finished: whether that is all of them; false after SIGTERM.
    loss_before: held-out loss of the student as it came, nats per token.
    loss_after: held-out loss at the end.
    seconds: of this process, compilation included.
    compile_seconds: of them.
    export: folder of the Hugging Face checkpoint.
  """

  step: int
  finished: bool
  loss_before: float | None
  loss_after: float | None
  seconds: float
  compile_seconds: float
  export: str | None


def train(config: RunConfig, workdir: str | Path) -> Summary:
  """Runs an experiment, or what is left of it, in a folder of its own.

  A folder with checkpoints of the same config is resumed: same tokens, same
  weights as without the interruption. SIGTERM saves and ends.

  Args:
    config: the experiment.
    workdir: gets `metrics.jsonl`, `samples.jsonl`, `tensorboard/`,
      `checkpoints/`, `summary.json` and `export/`.

  Raises:
    InputError: bad input; nothing was placed on a device.
    FloatingPointError: a metric is not finite.
  """
  began = time.monotonic()
  workdir = Path(workdir)
  first_process = jax.process_index() == 0
  tell = rich.console.Console(
    stderr=True, highlight=False, soft_wrap=True, quiet=not first_process
  )

  # --- Check everything on the host. ---
  setup = setup_lib.prepare(config)
  step = setup_lib.make_step(setup)
  with contextlib.ExitStack() as stack:
    checkpoints = Checkpoints(workdir / CHECKPOINT_FOLDER, config.checkpoint)
    stack.callback(checkpoints.close)
    checkpoints.save_manifest(dataclasses.asdict(config))
    for line in describe(setup, step):
      tell.print(line)

    # --- Weights, straight into their places. ---
    losses: dict[str, float | None] = {"before": None, "after": None}
    saved_step = checkpoints.latest()
    if saved_step is None:
      state = _initial_state(step, config.student.path)
    else:
      state, saved = checkpoints.restore(saved_step, step.abstract_state())
      setup.prompts.set_state(saved["prompts"])
      losses = saved["losses"]
      tell.print(f"resuming after step {saved_step}")
    done = saved_step or 0
    programs = Programs(step, config.mode)

    if done < config.steps:
      teacher = step.scorer.model("teacher")
      frozen = {
        "teacher": hf.load(config.teacher.path, teacher, teacher.compute_dtype)
      }

      # --- Programs, before the first step. ---
      tell.print("compiling the step ...")
      layout = step.scorer.student.layout
      programs.compile(state, frozen, _abstract_inputs(setup, layout))
      tell.print(f"compiled in {programs.compile_seconds:.1f} s")
      held_out_loss = _held_out_loss(setup, step, state.params)

      # --- The loop. ---
      writer = Writer(workdir, saved_step) if first_process else None
      progress = Progress(config.steps, start=done) if first_process else None
      for closing in (writer, progress):
        if closing is not None:
          stack.callback(closing.close)
      meter = Meter(setup)

      def record(values: Mapping[str, float]) -> None:
        if writer is not None and progress is not None:
          writer.metrics(done, values)
          progress.update(done, values)

      def evaluate_held_out() -> dict[str, float]:
        if held_out_loss is None:
          return {}
        with meter.paused():
          losses["after"] = held_out_loss(state.params)
          if done == 0:
            losses["before"] = losses["after"]
          values = {BEST_METRIC: losses["after"]}
          record(values)
        return values

      def save(values: Mapping[str, float]) -> None:
        if meter.steps:
          record(meter.close(done))
        with meter.paused():
          position = {"prompts": setup.prompts.get_state(), "losses": losses}
          checkpoints.save(done, state, position, values)

      if done == 0:
        evaluate_held_out()
      terminated = stack.enter_context(_terminated())
      profiler = stack.enter_context(
        _Profiler(config.log.profile_steps, workdir / "profile")
      )
      while done < config.steps and not terminated(done):
        inputs = place_inputs(next(setup.prompts), layout)
        if _due(config.log.time_split_every, done):
          with meter.paused():
            meter.split = programs.time_split(state, frozen, inputs)
        profiler.before(done, state)
        state, metrics, rollout = programs(state, frozen, inputs)
        done += 1
        meter.add(metrics)

        last = done == config.steps
        if last or _due(config.log.every, done):
          record(meter.close(done))
        if writer is not None and (last or _due(config.log.sample_every, done)):
          with meter.paused():
            writer.samples(done, _samples(setup, rollout))
        saving = last or _due(config.checkpoint.every, done)
        measured = {}
        if saving or _due(config.held_out.every, done):
          measured = evaluate_held_out()
        if saving:
          save(measured)
          saved_step = done
      if saved_step != done:
        save({})

    # --- What the user takes away. ---
    checkpoints.wait()
    finished = done == config.steps
    folder = workdir / EXPORT_FOLDER
    if finished:
      if first_process:
        shutil.rmtree(folder, ignore_errors=True)
      export(state.params, step.scorer.student, config.student.path, folder)
  summary = Summary(
    step=done,
    finished=finished,
    loss_before=losses["before"],
    loss_after=losses["after"],
    seconds=time.monotonic() - began,
    compile_seconds=programs.compile_seconds,
    export=str(folder) if finished else None,
  )
  if first_process:
    text = json.dumps(dataclasses.asdict(summary), indent=2)
    (workdir / "summary.json").write_text(text + "\n")
  return summary


def describe(setup: Setup, step: Step) -> Iterator[str]:
  """What a run is about to do, in a few lines."""
  config = setup.config
  report = setup.prompts.report
  mesh = step.scorer.student.layout.mesh
  sizes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
  yield (
    f"student {config.student.path} ({hf.parameter_count(setup.student):,} "
    f"parameters), teacher {config.teacher.path} "
    f"({hf.parameter_count(setup.teacher):,})"
  )
  yield (
    f"prompts {', '.join(config.data.sources)}: {report.kept} of "
    f"{report.rows} rows, {report.mean_length:.1f} tokens on average, the "
    f"longest {report.longest}"
  )
  if len(setup.prompts.reports) > 1:
    for name, part in setup.prompts.reports.items():
      yield (
        f"  {name}: {part.kept} of {part.rows} rows, weight "
        f"{config.data.sources[name].weight:g}"
      )
  if setup.prompts.teacher_window is not None:
    yield (
      "the teacher reads prompts of its own, the longest "
      f"{setup.prompts.teacher_window} tokens"
    )
  for count, fate in (
    (report.truncated, "longer than the window: their last tokens are used"),
    (report.dropped, "longer than the window and dropped"),
    (report.empty, "without a token and dropped"),
  ):
    if count:
      yield f"prompts: {count} {fate}"
  ids = {
    "student": setup.student.vocab_size,
    "teacher": setup.teacher.vocab_size,
  }
  padded = [
    f"{role} has {rows}"
    for role, rows in ids.items()
    if rows != setup.vocab_size
  ]
  if padded:
    yield (
      f"vocabulary: {setup.vocab_size} shared ids; {', '.join(padded)} rows, "
      "those beyond are masked"
    )
  yield (
    f"objective {setup.objective.name}, {config.steps} steps of "
    f"{config.batch.prompts} prompts x {config.batch.rollouts} rollouts, at "
    f"most {config.sampling.max_new_tokens} new tokens, stop ids "
    f"{list(setup.stop_ids)}"
  )
  yield (
    f"devices: {mesh.size} x {jax.devices()[0].device_kind}"
    f"{': ' + ' x '.join(sizes) if sizes else ''}, {config.mode} step"
  )


def place_inputs(batch: Batch, layout: Layout) -> StepInputs:
  """Prompts as a global batch: each host places what its devices hold."""

  def place(array: np.ndarray) -> jax.Array:
    axes = ("batch",) + (None,) * (array.ndim - 1)
    return jax.make_array_from_callback(
      array.shape, layout.sharding(axes), lambda index: array[index]
    )

  def place_prompts(prompts: Tokens) -> PromptBatch:
    return PromptBatch(
      tokens=place(prompts.tokens), lengths=place(prompts.lengths)
    )

  teacher = batch.teacher
  return StepInputs(
    prompts=place_prompts(batch),
    teacher_prompts=None if teacher is None else place_prompts(teacher),
  )


def _initial_state(step: Step, path: str) -> TrainState:
  """The checkpoint's weights with fresh optimizer state, in their places."""
  params = hf.load(path, step.scorer.student, "float32")
  places = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state())
  init = jax.jit(step.init_state, donate_argnums=0, out_shardings=places)
  return init(params)


def _abstract_inputs(setup: Setup, layout: Layout) -> StepInputs:
  rows = setup.config.batch.prompts

  def struct(shape: tuple[int, ...]) -> Any:
    axes = ("batch",) + (None,) * (len(shape) - 1)
    return jax.ShapeDtypeStruct(
      shape, jnp.int32, sharding=layout.sharding(axes)
    )

  def prompts(window: int) -> PromptBatch:
    return PromptBatch(tokens=struct((rows, window)), lengths=struct((rows,)))

  teacher_window = setup.prompts.teacher_window
  return StepInputs(
    prompts=prompts(setup.config.data.max_prompt_tokens),
    teacher_prompts=None if teacher_window is None else prompts(teacher_window),
  )


def _held_out_loss(
  setup: Setup, step: Step, params: Params
) -> Callable[[Params], float] | None:
  """The compiled evaluation, or None if the config has none."""
  if setup.held_out is None:
    return None
  model = step.scorer.student
  texts = setup.held_out.place(model.layout)
  compiled = (
    jax.jit(
      lambda params, tokens, lengths: held_out_lib.loss(
        model, params, tokens, lengths
      ),
      out_shardings=model.layout.replicated(),
    )
    .lower(params, *texts)
    .compile()
  )
  return lambda params: float(compiled(params, *texts))


def _samples(setup: Setup, rollout: Rollout) -> Sequence[Mapping[str, Any]]:
  """The first completions of the batch as text."""
  count = setup.config.log.samples
  rollout = jax.device_get(rollout)
  samples = []
  for row in range(min(count, len(rollout.tokens))):
    length = rollout.prompts.lengths[row]
    prompt = rollout.prompts.tokens[row][:length].tolist()
    drawn = rollout.tokens[row][rollout.sampled_mask[row]].tolist()
    samples.append(
      {
        "prompt": setup.tokenizer.decode(prompt),
        "completion": setup.tokenizer.decode_after(prompt, drawn),
        "length": len(drawn),
        "stopped": bool(rollout.stop_reason[row] == STOP_ID),
      }
    )
  return samples


def _due(every: int | None, done: int) -> bool:
  return every is not None and done % every == 0


class _Profiler(contextlib.AbstractContextManager):
  """Traces the steps first .. last into a folder, if there are any to trace."""

  def __init__(self, steps: tuple[int, ...] | None, folder: Path):
    self._steps = steps
    self._folder = folder
    self._running = False

  def before(self, step: int, state: TrainState) -> None:
    """Starts or ends the trace between the step before and this one."""
    if self._steps is None or step not in (self._steps[0], self._steps[1] + 1):
      return
    jax.block_until_ready(state)
    if step == self._steps[0]:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    else:
      self._stop()

  def _stop(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False

  def __exit__(self, *error: object) -> None:
    self._stop()


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[int], bool]]:
  """Tells, by step, whether the run should stop because SIGTERM came.

  With one process a second SIGTERM ends it at once. Several processes agree on
  the step, whichever of them the signal reached.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  seen = []

  def note(signum: int, frame: Any) -> None:
    seen.append(signum)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  before = signal.signal(signal.SIGTERM, note)
  try:
    yield lambda step: bool(seen)
  finally:
    signal.signal(signal.SIGTERM, before)
