"""On-policy distillation: what a run is made of, and where its loop starts."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax import flops, loop, preflight, processes, student
from opd_jax import setup as setup_lib
from opd_jax.config import FrozenModelSource, RunConfig
from opd_jax.data.prompts import Batch, Tokens
from opd_jax.evaluate import Accuracy
from opd_jax.meter import Work
from opd_jax.models import Model, ModelConfig, hf
from opd_jax.programs import Programs
from opd_jax.replay import Threshold
from opd_jax.rewards import Rewards, completion
from opd_jax.scoring import Parameters, Scorer, Weights
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
  report = processes.from_first(lambda: preflight.inspect(setup, step))
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
    self._programs = Programs(step, setup.mode)
    self._frozen: dict[str, Weights] = {}
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
    """The weights to start with and fresh optimizer state, in their places."""
    config = self.config
    return self._step.place_state(
      student.start(config.student, self.student, config.seed)
    )

  def weights(self, state: TrainState) -> Params:
    """The student's weights, with its adapters if these are what is trained."""
    if self.student.lora is not None and "base" not in self._frozen:
      self._frozen["base"] = student.load_base(
        self.config.student, self.student
      )
    base = self._frozen.get("base")
    return Parameters(student=state.params, base=base).of("student")

  def compile(self, state: TrainState) -> None:
    """Loads the frozen models and compiles the step."""
    self._frozen = load_frozen(self.config, self._step.scorer)
    inputs = self._setup.abstract_inputs(self.student.layout)
    self._programs.compile(state, self._frozen, inputs)

  def baseline(self) -> Mapping[str, float]:
    """The teacher's accuracy, if it is asked for, under names of its own."""
    problems = self._setup.teacher_problems
    if problems is None:
      return {}
    teacher = dataclasses.replace(
      self._step.scorer.model("teacher"), layout=self._step.decoder.layout
    )
    weights = self._frozen["teacher"]
    if isinstance(weights, tuple):
      weights = weights[0]
    found = Accuracy(problems, teacher)(weights)
    return {
      name.replace("eval/", "teacher/"): value for name, value in found.items()
    }

  def step(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics, Rollout]:
    """Rollout, scoring and update on a batch of prompts."""
    inputs = self._inputs(batch)
    host = None
    if self._setup.rewards is not None:
      host = functools.partial(self._judge, self._setup.rewards, batch)
    return self._programs(state, self._frozen, inputs, host)

  def _judge(self, rewards: Rewards, batch: Batch, rollout: Rollout) -> Rollout:
    """A rollout with its rewards, in the place of a rollout."""
    found = rewards(batch, rollout)
    placed = self.student.layout.place(found, (None,))
    return dataclasses.replace(rollout, rewards=placed)

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
    batch, selector = self.config.batch, self._step.selector
    kept = record.get("selection/fraction", 1.0)
    ranked = selector is None or "teacher" in selector.roles
    operations = flops.step(
      self._setup.student,
      self._scoring_teachers(),
      prompts=batch.prompts,
      rows=batch.prompts * batch.rollouts,
      prompt_length=record["rollout/prompt_length_mean"],
      completion_length=record["rollout/length_mean"],
      given_length=record.get("rollout/given_length_mean", 0.0),
      prefixes=self.config.rollout.prefix != "none",
      frozen_prompt_length=record.get("teacher/prompt_length_mean"),
      reference=self._setup.reference,
      mixed=self._setup.teacher if self.config.rollout.teacher_mix else None,
      epochs=batch.epochs,
      start=self._step.scores_start,
      kept=kept,
      frozen_kept=1.0 if ranked else kept,
      adapters=self.student.lora is not None,
    )
    return Work(tokens=record["rollout/tokens"], operations=operations)

  def _scoring_teachers(self) -> tuple[ModelConfig, ...]:
    """The teachers that run over every row: all, or none."""
    setup = self._setup
    if "teacher" not in self._step.frozen_roles:
      return ()
    return (setup.teacher, *(other.model for other in setup.domain_teachers))


def load_frozen(config: RunConfig, scorer: Scorer) -> dict[str, Weights]:
  """The weights that are not trained by role, in their places.

  Those of several teachers are a tuple, in the order of `Scorer.models`. Two
  models of the same checkpoint and dtype hold the same arrays; so does "base",
  the student's weights where adapters of them are trained.
  """
  loaded: dict[FrozenModelSource, Params] = {}
  frozen: dict[str, Weights] = {}
  base = student.load_base(config.student, scorer.student)
  if base is not None:
    frozen["base"] = loaded[config.student.as_frozen()] = base

  def load(source: FrozenModelSource, model: Model) -> Params:
    if source not in loaded:
      loaded[source] = hf.load(source.path, model, source.compute_dtype)
    return loaded[source]

  others, _ = setup_lib.route(config)
  teachers = (config.teacher, *others.values())
  weights = tuple(map(load, teachers, scorer.models("teacher")))
  frozen["teacher"] = weights if others else weights[0]
  if config.reference is not None:
    frozen["reference"] = load(config.reference, scorer.model("reference"))
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
  yield from student.describe(step.scorer.student)
  for other in setup.domain_teachers:
    yield (
      f"{other.role}: {other.source.path} ({hf.parameter_count(other.model):,})"
    )
  if setup.domain_teachers:
    yield (
      f"all {len(setup.domain_teachers) + 1} teachers score all rows; each row "
      "learns from that of its source"
    )
  if setup.reference is not None and config.reference is not None:
    teachers = (config.teacher, *config.domain_teachers.values())
    shared = config.reference in teachers
    yield (
      f"reference {config.reference.path} "
      f"({hf.parameter_count(setup.reference):,}"
      f"{', the weights of a teacher' if shared else ''})"
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
    **{other.role: other.model.vocab_size for other in setup.domain_teachers},
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
  if config.batch.updates > 1:
    yield (
      f"updates: {config.batch.updates} per step, {config.batch.mini_batches} "
      f"mini-batches x {config.batch.epochs} epochs"
    )
  if config.rollout.teacher_mix > 0:
    yield (
      f"drawn from {config.rollout.teacher_mix:g} x teacher + "
      f"{1 - config.rollout.teacher_mix:g} x student"
    )
  yield from _describe_given(config)
  if config.selection is not None:
    yield (
      f"loss on {100 * config.selection.fraction:g} % of the tokens, chosen by "
      f"{config.selection.name}"
    )
  yield f"{loop.devices(step.scorer.student)}, {setup.mode} step"


def _describe_given(config: RunConfig) -> Iterator[str]:
  """How much of the completions is not drawn, as far as it can be said."""
  mixing = config.rollout
  if not mixing.reads_given:
    return
  sources = config.data.sources.values()
  stored = sum(source.weight for source in sources if source.given)
  share = stored / sum(source.weight for source in sources)
  if mixing.stored_fraction > 0:
    yield (
      f"stored completions: {100 * share * mixing.stored_fraction:.3g} % of "
      f"the rows, decided for each {mixing.stored_scope}"
    )
  if mixing.prefix != "none":
    begun = share * (1 - mixing.stored_fraction)
    yield (
      f"prefixes: {100 * begun:.3g} % of the rows begin with stored tokens, at "
      f"most {config.sampling.max_new_tokens} of them at the start, none at "
      f"the end ({mixing.prefix}, {mixing.prefix_draw})"
    )
  if mixing.replay_capacity is not None:
    line = (
      f"replay: {100 * mixing.replay_threshold:.3g} % of the steps draw or "
      f"replay at first, of {mixing.replay_capacity} completions; the others "
      f"take stored ones, which {100 * share:.3g} % of the rows have"
    )
    if mixing.replay_threshold == 0:
      line += "; nothing is drawn for these until the held-out loss has risen"
    yield line


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
    sources=None if batch.sources is None else place(batch.sources),
  )


def _samples(setup: Setup, rollout: Rollout) -> Sequence[Mapping[str, Any]]:
  """The first completions of the batch as text."""
  count = setup.config.log.samples
  rollout = jax.device_get(rollout)
  samples: list[dict[str, Any]] = []
  for row in range(min(count, len(rollout.tokens))):
    width = rollout.prompts.lengths[row]
    prompt = rollout.prompts.tokens[row][:width].tolist()
    length = int(rollout.lengths[row])
    sample: dict[str, Any] = {
      "prompt": setup.tokenizer.decode(prompt),
      "completion": completion(setup.tokenizer, rollout, row),
      "length": length,
      "stopped": bool(rollout.stop_reason[row] == STOP_ID),
    }
    if setup.prompts.given_window is not None:
      sample["given"] = length - int(rollout.sampled_mask[row].sum())
    if rollout.rewards is not None:
      sample["reward"] = float(rollout.rewards[row])
    samples.append(sample)
  return samples
