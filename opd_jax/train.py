"""On-policy distillation: what a run is made of, and where its loop starts."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import flops, loop, preflight
from opd_jax import setup as setup_lib
from opd_jax.config import ModelSource, RunConfig
from opd_jax.data.prompts import Batch, Tokens
from opd_jax.evaluate import Accuracy
from opd_jax.meter import Work
from opd_jax.models import Model, hf
from opd_jax.programs import Programs
from opd_jax.replay import Threshold
from opd_jax.scoring import Scorer
from opd_jax.setup import Setup
from opd_jax.sharding import Layout
from opd_jax.step import Step
from opd_jax.summary import Summary
from opd_jax.types import (
  STOP_ID,
  Params,
  PromptBatch,
  Rollout,
  StepInputs,
  TrainState,
)
from opd_jax.update import Metrics


def train(config: RunConfig, workdir: str | Path) -> Summary:
  """Runs an experiment, or what is left of it, in a folder of its own.

  A folder with checkpoints of the same config is resumed: same tokens, same
  weights as without the interruption. SIGTERM and Ctrl-C save and end it.

  Args:
    config: the experiment.
    workdir: see `loop.run`.

  Raises:
    InputError: bad input; nothing was placed on a device.
    FloatingPointError: a metric is not finite.
  """
  began = time.monotonic()
  setup = setup_lib.prepare(config)
  step = setup_lib.make_step(setup)
  report = preflight.inspect(setup, step)
  report.enforce()
  return loop.run(
    Distillation(setup, step, report),
    setup.prompts,
    workdir,
    measurements=setup_lib.measurements(
      config, step.scorer.student, setup.held_out, setup.problems
    ),
    began=began,
  )


class Distillation:
  """The task of `train`; see `task.Task`.

  Attributes:
    kind: names the command.
    config: of the run.
    student: in the training layout.
  """

  kind = "train"

  def __init__(self, setup: Setup, step: Step, report: preflight.Report):
    """Places nothing yet."""
    self._setup = setup
    self._report = report
    self._step = step
    self._programs = Programs(step, setup.config.mode)
    self._frozen: dict[str, Params] = {}
    self._threshold = None
    if setup.config.rollout.replay_capacity is not None:
      self._threshold = Threshold(setup.config.rollout)
    self.config = setup.config
    self.student: Model = step.scorer.student

  @property
  def compile_seconds(self) -> float:
    """Spent compiling so far."""
    return self._programs.compile_seconds

  def describe(self) -> Iterator[str]:
    """What a run is about to do, in a few lines."""
    yield from describe(self._setup, self._step)
    for line in self._report.brief():
      yield f"preflight: {line}"

  def abstract_state(self) -> TrainState:
    """Shapes and places of the state."""
    return self._step.abstract_state()

  def initial_state(self) -> TrainState:
    """The checkpoint's weights with fresh optimizer state, in their places."""
    params = hf.load(self.config.student.path, self.student, "float32")
    return self._step.place_state(params)

  def compile(self, state: TrainState) -> None:
    """Loads the frozen models and compiles the step."""
    self._frozen = load_frozen(self.config, self._step.scorer)
    inputs = _abstract_inputs(self._setup, self.student.layout)
    self._programs.compile(state, self._frozen, inputs)

  def baseline(self) -> Mapping[str, float]:
    """The teacher's accuracy, if it is asked for, under names of its own."""
    problems = self._setup.teacher_problems
    if problems is None:
      return {}
    teacher = dataclasses.replace(
      self._step.scorer.model("teacher"), layout=self._step.decoder.layout
    )
    found = Accuracy(problems, teacher)(self._frozen["teacher"])
    return {
      name.replace("eval/", "teacher/"): value for name, value in found.items()
    }

  def step(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics, Rollout]:
    """Rollout, scoring and update on a batch of prompts."""
    inputs = self._inputs(batch)
    return self._programs(state, self._frozen, inputs)

  def observe(self, step: int, values: Mapping[str, float]) -> None:
    """The held-out loss moves the threshold of the replay buffer.

    Only where the loss is due by `held_out.every`, so that when a run saves
    does not change what it computes.
    """
    loss = values.get("held_out/loss")
    due = step % self.config.held_out.every == 0
    if self._threshold is not None and loss is not None and due:
      self._threshold.observe(loss)

  def get_state(self) -> dict[str, Any]:
    """The threshold of the replay buffer, as JSON."""
    return {} if self._threshold is None else self._threshold.get_state()

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on with the threshold of a checkpoint."""
    if self._threshold is not None:
      self._threshold.set_state(state)

  def samples(self, shown: Rollout) -> Sequence[Mapping[str, Any]]:
    """The first completions of the batch as text."""
    return _samples(self._setup, shown)

  def time_split(self, state: TrainState, batch: Batch) -> dict[str, float]:
    """Seconds of sampling and of teacher scoring, each run by itself."""
    inputs = self._inputs(batch)
    return self._programs.time_split(state, self._frozen, inputs)

  def _inputs(self, batch: Batch) -> StepInputs:
    threshold = None if self._threshold is None else self._threshold.value
    return place_inputs(batch, self.student.layout, threshold)

  def work(self, record: Mapping[str, float]) -> Work:
    """Tokens drawn, and the operations of all models."""
    batch = self.config.batch
    operations = flops.step(
      self._setup.student,
      (self._setup.teacher,),
      prompts=batch.prompts,
      rows=batch.prompts * batch.rollouts,
      prompt_length=record["rollout/prompt_length_mean"],
      completion_length=record["rollout/length_mean"],
      frozen_prompt_length=record.get("teacher/prompt_length_mean"),
      reference=self._setup.reference,
    )
    return Work(tokens=record["rollout/tokens"], operations=operations)


def load_frozen(config: RunConfig, scorer: Scorer) -> dict[str, Params]:
  """The weights of the frozen models by role, in their places.

  Two roles of the same checkpoint and dtype hold the same arrays.
  """
  sources = {"teacher": config.teacher, "reference": config.reference}
  loaded: dict[ModelSource, Params] = {}
  frozen = {}
  for role, source in sources.items():
    if source is None:
      continue
    if source not in loaded:
      loaded[source] = hf.load(
        source.path, scorer.model(role), source.compute_dtype
      )
    frozen[role] = loaded[source]
  return frozen


def describe(setup: Setup, step: Step) -> Iterator[str]:
  """What a run is about to do, in a few lines."""
  config = setup.config
  report = setup.prompts.report
  yield (
    f"student {config.student.path} ({hf.parameter_count(setup.student):,} "
    f"parameters), teacher {config.teacher.path} "
    f"({hf.parameter_count(setup.teacher):,})"
  )
  if setup.reference is not None and config.reference is not None:
    shared = config.reference == config.teacher
    yield (
      f"reference {config.reference.path} "
      f"({hf.parameter_count(setup.reference):,}"
      f"{', the weights of the teacher' if shared else ''})"
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
  if report.given_cut:
    yield (
      f"given completions: {report.given_cut} longer than "
      "sampling.max_new_tokens, cut there"
    )
  for name, origin in setup.origins.items():
    yield f"given completions of {name}: written by {origin.model}"
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
  if setup.reference is not None:
    ids["reference"] = setup.reference.vocab_size
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
  yield f"{loop.devices(step.scorer.student)}, {config.mode} step"


def place_inputs(
  batch: Batch, layout: Layout, threshold: float | None = None
) -> StepInputs:
  """Prompts as a global batch: each host places what its devices hold.

  Args:
    batch: of this step.
    layout: of the student in training.
    threshold: of the replay buffer; None if there is none.
  """
  place = layout.place_rows

  def place_prompts(prompts: Tokens) -> PromptBatch:
    return PromptBatch(
      tokens=place(prompts.tokens), lengths=place(prompts.lengths)
    )

  return StepInputs(
    prompts=place_prompts(batch),
    teacher_prompts=None
    if batch.teacher is None
    else place_prompts(batch.teacher),
    given=None if batch.given is None else place_prompts(batch.given),
    replay_threshold=None
    if threshold is None
    else layout.place(np.asarray(threshold, np.float32), ()),
  )


def _abstract_inputs(setup: Setup, layout: Layout) -> StepInputs:
  rows = setup.config.batch.prompts

  def struct(shape: tuple[int, ...]) -> Any:
    axes = ("batch",) + (None,) * (len(shape) - 1)
    return jax.ShapeDtypeStruct(
      shape, jnp.int32, sharding=layout.sharding(axes)
    )

  def prompts(window: int | None) -> Any:
    if window is None:
      return None
    return PromptBatch(tokens=struct((rows, window)), lengths=struct((rows,)))

  threshold: Any = None
  if setup.config.rollout.replay_capacity is not None:
    threshold = jax.ShapeDtypeStruct(
      (), jnp.float32, sharding=layout.replicated()
    )
  return StepInputs(
    prompts=prompts(setup.config.data.max_prompt_tokens),
    teacher_prompts=prompts(setup.prompts.teacher_window),
    given=prompts(setup.prompts.given_window),
    replay_threshold=threshold,
  )


def _samples(setup: Setup, rollout: Rollout) -> Sequence[Mapping[str, Any]]:
  """The first completions of the batch as text."""
  count = setup.config.log.samples
  rollout = jax.device_get(rollout)
  samples = []
  for row in range(min(count, len(rollout.tokens))):
    length = rollout.prompts.lengths[row]
    prompt = rollout.prompts.tokens[row][:length].tolist()
    ids = rollout.tokens[row][: rollout.lengths[row]].tolist()
    samples.append(
      {
        "prompt": setup.tokenizer.decode(prompt),
        "completion": setup.tokenizer.decode_after(prompt, ids),
        "length": len(ids),
        "stopped": bool(rollout.stop_reason[row] == STOP_ID),
      }
    )
    if setup.prompts.given_window is not None:
      samples[-1]["given"] = len(ids) - int(rollout.sampled_mask[row].sum())
  return samples
