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

from opd_jax import evaluate, flops
from opd_jax import setup as setup_lib
from opd_jax.checkpoint import BEST_METRIC, Checkpoints
from opd_jax.config import RunConfig
from opd_jax.data import Batch
from opd_jax.export import export
from opd_jax.metrics import Progress, Writer, check_finite
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
  tell = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)

  # --- Check everything on the host. ---
  setup = setup_lib.prepare(config)
  step = setup_lib.make_step(setup)
  for line in describe(setup, step):
    tell.print(line)

  with contextlib.closing(
    Checkpoints(workdir / CHECKPOINT_FOLDER, config.checkpoint)
  ) as checkpoints:
    checkpoints.save_manifest(dataclasses.asdict(config))

    # --- Weights, straight into their places. ---
    loss_before = None
    if checkpoints.latest() is None:
      state = _initial_state(step, config.student.path)
    else:
      state, saved = checkpoints.restore(None, step.abstract_state())
      setup.prompts.set_state(saved["prompts"])
      loss_before = saved["loss_before"]
    start = done = int(state.step)
    teacher = step.scorer.model("teacher")
    frozen = {
      "teacher": hf.load(config.teacher.path, teacher, teacher.compute_dtype)
    }

    # --- Programs, before the first step. ---
    layout = step.scorer.student.layout
    programs = Programs(step, config.mode)
    programs.compile(state, frozen, _abstract_inputs(config, layout))
    held_out_loss = _held_out_loss(setup, step, state.params)
    tell.print(f"compiled in {programs.compile_seconds:.1f} s")

    # --- The loop. ---
    writer = Writer(workdir, resumed_step=start if start else None)
    progress = Progress(config.steps, start=start)
    window = _Window(setup)
    saved_step = checkpoints.latest()
    loss_after = loss_before

    def evaluated() -> float:
      with window.paused():
        value = held_out_loss(state.params)
        writer.metrics(done, {BEST_METRIC: value})
        progress.update(done, {BEST_METRIC: value})
      return value

    def save(metrics: Mapping[str, float]) -> None:
      with window.paused():
        window.check(done)
        position = {
          "prompts": setup.prompts.get_state(),
          "loss_before": loss_before,
        }
        checkpoints.save(done, state, position, metrics)

    if held_out_loss is not None and done == 0:
      loss_before = loss_after = evaluated()
    with _terminated() as terminated:
      while done < config.steps and not terminated():
        batch = next(setup.prompts)
        inputs = place_inputs(batch, layout)
        if _due(config.log.time_split_every, done):
          with window.paused():
            window.split = programs.time_split(state, frozen, inputs)
        _profile(config.log.profile_steps, done, workdir)
        state, metrics, rollout = programs(state, frozen, inputs)
        done += 1
        window.add(metrics, inputs)

        last = done == config.steps
        if last or _due(config.log.every, done):
          values = window.close(done)
          writer.metrics(done, values)
          progress.update(done, values)
        if last or _due(config.log.sample_every, done):
          with window.paused():
            writer.samples(done, _samples(setup, batch, rollout))
        saving = last or _due(config.checkpoint.every, done)
        measured = {}
        if held_out_loss is not None and (
          saving or _due(config.eval.every, done)
        ):
          loss_after = evaluated()
          measured = {BEST_METRIC: loss_after}
        if saving:
          save(measured)
          saved_step = done
    if saved_step != done:
      save({})
    _profile(config.log.profile_steps, None, workdir)
    progress.close()
    checkpoints.wait()
    writer.close()

    # --- What the user takes away. ---
    finished = done == config.steps
    folder = workdir / EXPORT_FOLDER
    if finished:
      shutil.rmtree(folder, ignore_errors=True)
      export(state.params, step.scorer.student, config.student.path, folder)
    summary = Summary(
      step=done,
      finished=finished,
      loss_before=loss_before,
      loss_after=loss_after,
      seconds=time.monotonic() - began,
      compile_seconds=programs.compile_seconds,
      export=str(folder) if finished else None,
    )
    write_json(workdir / "summary.json", dataclasses.asdict(summary))
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
    f"prompts {config.data.path}: {report.kept} of {report.rows} rows, "
    f"{report.truncated} truncated, {report.dropped} too long and dropped, "
    f"{report.empty} empty, mean {report.mean_length:.1f} and at most "
    f"{report.longest} tokens"
  )
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
    f"{mesh.size} {jax.devices()[0].device_kind} device(s)"
    f"{': ' + ' x '.join(sizes) if sizes else ''}, {config.mode} step"
  )


def place_inputs(batch: Batch, layout: Layout) -> StepInputs:
  """This host's share of the prompts as a part of the global batch."""

  def place(array: np.ndarray) -> jax.Array:
    axes = ("batch",) + (None,) * (array.ndim - 1)
    return jax.make_array_from_process_local_data(layout.sharding(axes), array)

  return StepInputs(
    prompts=PromptBatch(
      tokens=place(batch.tokens), lengths=place(batch.lengths)
    )
  )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
  """Writes an object to a file, by the first process only."""
  if jax.process_index() == 0:
    path.write_text(json.dumps(values, indent=2) + "\n")


class _Window:
  """Metrics and seconds since the last record; the device runs ahead."""

  def __init__(self, setup: Setup):
    self._setup = setup
    self._metrics: list[Mapping[str, jax.Array]] = []
    self._prompt_lengths: list[jax.Array] = []
    self._began = time.monotonic()
    self.split: Mapping[str, float] = {}

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What happens inside is not part of the steps' time."""
    jax.block_until_ready(self._metrics)
    start = time.monotonic()
    yield
    self._began += time.monotonic() - start

  def add(self, metrics: Mapping[str, jax.Array], inputs: StepInputs) -> None:
    """Notes a step, without waiting for it."""
    self._metrics.append(metrics)
    self._prompt_lengths.append(inputs.prompts.lengths)

  def check(self, step: int) -> None:
    """Raises FloatingPointError if a step up to this one has diverged."""
    fetched = jax.device_get(self._metrics)
    for index, values in enumerate(fetched, start=step - len(fetched) + 1):
      check_finite(values, (index, index))

  def close(self, step: int) -> dict[str, float]:
    """The record of the steps since the last one; starts the next window.

    Means over the steps; `/max` and `length_max` are maxima.
    """
    self.check(step)
    fetched = jax.device_get(self._metrics)
    seconds = (time.monotonic() - self._began) / len(fetched)
    record = {
      name: float(
        (np.max if name.endswith("max") else np.mean)(
          [values[name] for values in fetched]
        )
      )
      for name in fetched[0]
    }
    record["time/step"] = seconds
    record["train/tokens_per_second"] = record["rollout/tokens"] / seconds
    if self.split:
      record |= self.split
      rest = seconds - sum(self.split.values())
      record["time/update"] = max(rest, 0.0)
    record |= self._utilisation(record, seconds)
    self._metrics = []
    self._prompt_lengths = []
    self._began = time.monotonic()
    return record

  def _utilisation(
    self, record: Mapping[str, float], seconds: float
  ) -> dict[str, float]:
    batch = self._setup.config.batch
    operations = flops.step(
      self._setup.student,
      (self._setup.teacher,),
      prompts=batch.prompts,
      rows=batch.prompts * batch.rollouts,
      prompt_length=float(jnp.mean(jnp.stack(self._prompt_lengths))),
      completion_length=record["rollout/length_mean"],
    )
    rate = operations / seconds / jax.device_count()
    found = {"train/tflops_per_device": rate / 1e12}
    device = jax.local_devices()[0]
    peak = flops.peak(device.device_kind)
    if peak is not None:
      found["train/mfu"] = rate / peak
    memory = device.memory_stats() or {}
    if "peak_bytes_in_use" in memory:
      found["memory/peak_gib"] = memory["peak_bytes_in_use"] / 2**30
    return found


def _initial_state(step: Step, path: str) -> TrainState:
  """The checkpoint's weights with fresh optimizer state, in their places."""
  params = hf.load(path, step.scorer.student, "float32")
  places = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state())
  init = jax.jit(step.init_state, donate_argnums=0, out_shardings=places)
  return init(params)


def _abstract_inputs(config: RunConfig, layout: Layout) -> StepInputs:
  rows, window = config.batch.prompts, config.data.max_prompt_tokens

  def struct(shape: tuple[int, ...]) -> Any:
    axes = ("batch",) + (None,) * (len(shape) - 1)
    return jax.ShapeDtypeStruct(
      shape, jnp.int32, sharding=layout.sharding(axes)
    )

  return StepInputs(
    prompts=PromptBatch(tokens=struct((rows, window)), lengths=struct((rows,)))
  )


def _held_out_loss(
  setup: Setup, step: Step, params: Params
) -> Callable[[Params], float] | None:
  """The compiled evaluation, or None if the config has none."""
  if setup.held_out is None:
    return None
  model = step.scorer.student
  texts = jax.device_put(
    (setup.held_out.tokens, setup.held_out.lengths),
    model.layout.replicated(),
  )
  compiled = (
    jax.jit(
      lambda params, tokens, lengths: evaluate.loss(
        model, params, tokens, lengths
      ),
      out_shardings=model.layout.replicated(),
    )
    .lower(params, *texts)
    .compile()
  )
  return lambda params: float(compiled(params, *texts))


def _samples(
  setup: Setup, batch: Batch, rollout: Rollout
) -> Sequence[Mapping[str, Any]]:
  """The first completions of the batch as text."""
  count = setup.config.log.samples
  rollouts = setup.config.batch.rollouts
  tokens, mask, reason = jax.device_get(
    (rollout.tokens, rollout.sampled_mask, rollout.stop_reason)
  )
  decode = setup.tokenizer.decode
  return [
    {
      "prompt": decode(
        batch.tokens[row // rollouts][: batch.lengths[row // rollouts]].tolist()
      ),
      "completion": decode(tokens[row][mask[row]].tolist()),
      "length": int(mask[row].sum()),
      "stopped": bool(reason[row] == STOP_ID),
    }
    for row in range(min(count, len(batch.rows) * rollouts))
  ]


def _due(every: int | None, done: int) -> bool:
  return every is not None and done % every == 0


def _profile(
  steps: tuple[int, ...] | None, done: int | None, workdir: Path
) -> None:
  """Starts and stops the trace; `done` None stops one that is running."""
  if steps is None:
    return
  if done == steps[0]:
    jax.profiler.start_trace(str(workdir / "profile"))
  elif done == steps[1] + 1:
    jax.profiler.stop_trace()


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[], bool]]:
  """Tells whether SIGTERM came; a second one ends the process at once."""
  seen = []

  def note(signum: int, frame: Any) -> None:
    seen.append(signum)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  before = signal.signal(signal.SIGTERM, note)
  try:
    yield lambda: bool(seen)
  finally:
    signal.signal(signal.SIGTERM, before)
