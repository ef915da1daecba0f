"""Supervised fine-tuning: prompts and completions from files, packed rows.

Warm starts, and small teachers from random weights. Scoring, gradient, update
and the loop are those of `train`.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import (
  evaluate,
  flops,
  loop,
  optim,
  preflight,
  processes,
  tokenizer,
)
from opd_jax import student as student_lib
from opd_jax.config import SamplingConfig, SftConfig
from opd_jax.data import sources
from opd_jax.data.packing import PackedBatch, PackedExamples
from opd_jax.errors import InputError
from opd_jax.evaluate import Problems
from opd_jax.held_out import HeldOut
from opd_jax.meter import Work
from opd_jax.models import Model, ModelConfig, hf
from opd_jax.objectives import sft as objective
from opd_jax.objectives.base import Objective
from opd_jax.programs import compiled
from opd_jax.scoring import Parameters, Scorer
from opd_jax.setup import measurements, read_held_out
from opd_jax.sharding import Layout, layouts, make_mesh
from opd_jax.summary import Summary
from opd_jax.tokenizer import Tokenizer
from opd_jax.types import (
  PackedRows,
  Packing,
  Params,
  PromptBatch,
  ScoringBatch,
  TrainState,
)
from opd_jax.update import Frozen, Metrics, Update

OBJECTIVE = Objective.bind("sft", objective, objective.Config())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftSetup:
  """What a run is made of, on the host.

  Attributes:
    config: of the run.
    student: its architecture.
    tokenizer: of the student.
    vocab_size: ids that the model and the tokenizer have.
    examples: endless batches of packed rows.
    held_out: texts of the held-out loss, if there are any.
    problems: of the evaluation, if there is one.
    report: whether rows of these two are learned.
  """

  config: SftConfig
  student: ModelConfig
  tokenizer: Tokenizer
  vocab_size: int
  examples: PackedExamples
  held_out: HeldOut | None
  problems: Problems | None
  report: preflight.Report


@sources.read_once()
def prepare(config: SftConfig) -> SftSetup:
  """Reads and checks all a run needs.

  Raises:
    InputError: whatever is wrong with the config, the checkpoint or the data.
  """
  path = config.student.path
  student = hf.read_config(path)
  if config.student.init == "checkpoint":
    hf.check(path, student)
  tokens = tokenizer.load(hf.resolve(path))
  vocab_size = min(student.vocab_size, tokens.id_count)
  examples = PackedExamples(
    config.data,
    tokens,
    seed=config.seed,
    rows=config.batch.rows,
    row_tokens=config.batch.row_tokens,
    vocab_size=vocab_size,
  )
  longest = examples.report.longest_kept
  if longest > student.max_positions:
    raise InputError(
      f"an example has {longest} tokens, more than the student's window of "
      f"{student.max_positions} positions ({path}); set batch.row_tokens to at "
      "most that, so that such examples are dropped"
    )
  return SftSetup(
    config=config,
    student=student,
    tokenizer=tokens,
    vocab_size=vocab_size,
    examples=examples,
    held_out=read_held_out(config.held_out, student, tokens),
    problems=evaluate.of_run(config.eval, SamplingConfig(), tokens, student),
    report=processes.from_first(lambda: preflight.inspect_rows(config)),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftStep(Update):
  """The step on packed rows; its methods are pure and jit-able."""

  def train(
    self, state: TrainState, frozen: Frozen, rows: PackedRows
  ) -> tuple[TrainState, Metrics]:
    """Maximum likelihood of the learned ids of packed rows."""
    batch = scoring_batch(rows)
    state, metrics = self.update(state, frozen, batch, pure_sampling=False)
    filled = rows.packing.positions >= 0
    first = rows.packing.positions == 0
    tokens = jnp.sum(filled, dtype=jnp.float32)
    context = jnp.sum(jnp.where(filled, rows.packing.positions, 0))
    return state, {
      **metrics,
      "packing/used": tokens / rows.tokens.size,
      "packing/tokens": tokens,
      "packing/learned": jnp.sum(rows.learned, dtype=jnp.float32),
      "packing/examples": jnp.sum(first, dtype=jnp.float32),
      "packing/context_mean": context / jnp.maximum(tokens, 1.0),
    }


def scoring_batch(rows: PackedRows) -> ScoringBatch:
  """Packed rows as the scorer takes them: the first slot, and all others."""
  learned = rows.learned[:, 1:]
  count, length = learned.shape
  return ScoringBatch(
    prompts=PromptBatch(
      tokens=rows.tokens[:, :1], lengths=jnp.ones(count, jnp.int32)
    ),
    tokens=rows.tokens[:, 1:],
    lengths=jnp.full(count, length, jnp.int32),
    sampled_mask=jnp.zeros_like(learned),
    loss_mask=learned,
    behavior_valid=jnp.zeros_like(learned),
    behavior_logprobs=jnp.zeros(learned.shape, jnp.float32),
    group=jnp.arange(count, dtype=jnp.int32),
    packing=rows.packing,
  )


def make_step(setup: SftSetup, mesh: Mesh | None = None) -> SftStep:
  """The step of a run on a mesh, by default that of the config.

  Raises:
    InputError: the mesh divides neither the devices, the batch nor the model.
  """
  config = setup.config
  if mesh is None:
    mesh = make_mesh(config.mesh.sizes)
  layout, _ = layouts(mesh, config.mesh)
  rows = config.batch.rows // config.batch.micro_batches
  shards = layout.shards("batch")
  if rows % shards:
    raise InputError(
      f"rows of a micro-batch = {rows} (batch.rows = {config.batch.rows}) is "
      f"not divisible by the {shards} shards of the batch (mesh replica x "
      "fsdp); change batch.rows, batch.micro_batches or mesh"
    )
  student = student_lib.make(config.student, setup.student, layout)
  student.abstract_params()
  return SftStep(
    scorer=Scorer(
      student=student,
      vocab_size=setup.vocab_size,
      chunk_tokens=config.batch.chunk_tokens,
    ),
    objective=OBJECTIVE,
    optimizer=optim.build(config.optimizer, config.steps),
    learning_rate=optim.learning_rate(config.optimizer, config.steps),
    micro_batches=config.batch.micro_batches,
    steps=config.steps,
    seed=config.seed,
  )


def sft(config: SftConfig, workdir: str | Path) -> Summary:
  """Runs a fine-tuning, or what is left of it, in a folder of its own.

  A folder with checkpoints of the same config is resumed: same rows, same
  weights as without the interruption. SIGTERM and Ctrl-C save and end it.

  Args:
    config: the experiment.
    workdir: see `loop.run`.

  Raises:
    InputError: bad input; nothing was placed on a device.
    FloatingPointError: a metric is not finite.
  """
  began = time.monotonic()
  setup = prepare(config)
  setup.report.enforce()
  step = make_step(setup)
  return loop.run(
    FineTuning(setup, step),
    setup.examples,
    workdir,
    measurements=measurements(
      config, step.scorer.student, setup.held_out, setup.problems
    ),
    began=began,
  )


class FineTuning:
  """The task of `sft`; see `task.Task`.

  Attributes:
    kind: names the command.
    config: of the run.
    student: in the training layout.
    compile_seconds: spent compiling so far.
  """

  kind = "sft"

  def __init__(self, setup: SftSetup, step: SftStep):
    """Places nothing yet."""
    self._setup = setup
    self._step = step
    self._program: Any = None
    self._frozen: Frozen = {}
    self.config = setup.config
    self.student: Model = step.scorer.student
    self.compile_seconds = 0.0

  def describe(self) -> Iterator[str]:
    """What a run is about to do, in a few lines."""
    config, report = self.config, self._setup.examples.report
    start = {"checkpoint": "its weights", "random": "random weights"}
    yield (
      f"student {config.student.path} "
      f"({hf.parameter_count(self._setup.student):,} parameters), from "
      f"{start[config.student.init]}"
    )
    yield from student_lib.describe(self.student)
    yield (
      f"examples {', '.join(config.data.sources)}: {report.kept} of "
      f"{report.rows} rows, {report.mean_length:.1f} tokens on average, the "
      f"longest {report.longest}"
    )
    for count, fate in (
      (report.dropped, "longer than batch.row_tokens and dropped"),
      (report.empty, "with an empty completion and dropped"),
    ):
      if count:
        yield f"examples: {count} {fate}"
    batch = config.batch
    yield (
      f"{config.steps} steps of {batch.rows} rows of {batch.row_tokens} tokens,"
      f" {100 * report.used:.1f} % of them used"
    )
    yield loop.devices(self.student)
    for line in self._setup.report.brief():
      yield f"preflight: {line}"

  def abstract_state(self) -> TrainState:
    """Shapes and places of the state."""
    return self._step.abstract_state()

  def initial_state(self) -> TrainState:
    """The weights to start with and fresh optimizer state, in their places."""
    source, seed = self.config.student, self.config.seed
    if source.init == "random":
      params = self.student.init(jax.random.key(seed))
    else:
      params = student_lib.start(source, self.student, seed)
    return self._step.place_state(params)

  def weights(self, state: TrainState) -> Params:
    """The student's weights, with its adapters if these are what is trained."""
    parameters = Parameters(student=state.params, **self._load_frozen())
    return parameters.of("student")

  def _load_frozen(self) -> Frozen:
    """The weights that adapters belong to, if adapters are trained."""
    if self.student.lora is not None and not self._frozen:
      base = student_lib.load_base(self.config.student, self.student)
      self._frozen = {"base": base}
    return self._frozen

  def compile(self, state: TrainState) -> None:
    """Compiles the step."""
    began = time.monotonic()
    batch = self.config.batch
    layout = self.student.layout
    place = layout.sharding(("batch", None))

    def struct(dtype: Any) -> Any:
      shape = (batch.rows, batch.row_tokens)
      return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    rows = PackedRows(
      tokens=struct(jnp.int32),
      packing=Packing(positions=struct(jnp.int32), segments=struct(jnp.int32)),
      learned=struct(jnp.bool_),
    )
    self._program = compiled(
      self._step.train,
      (state, self._load_frozen(), rows),
      donate_argnums=0,
      out_shardings=(
        jax.tree.map(lambda leaf: leaf.sharding, state),
        layout.replicated(),
      ),
    )
    self.compile_seconds += time.monotonic() - began

  def baseline(self) -> Mapping[str, float]:
    """There are no frozen models."""
    return {}

  def step(
    self, state: TrainState, batch: PackedBatch
  ) -> tuple[TrainState, Metrics, PackedBatch]:
    """An update on a batch of packed rows."""
    rows = place_rows(batch, self.student.layout)
    return *self._program(state, self._frozen, rows), batch

  def observe(self, step: int, values: Mapping[str, float]) -> None:
    """Nothing follows what is measured."""

  def get_state(self) -> dict[str, Any]:
    """There is none besides the train state."""
    return {}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """See `get_state`."""

  def samples(self, shown: PackedBatch) -> Sequence[Mapping[str, Any]]:
    """The first examples of the batch as text, as the model reads them."""
    tokens = self._setup.tokenizer
    examples = [index for row in shown.examples for index in row]
    samples = []
    for index in examples[: self.config.log.samples]:
      example = self._setup.examples.example(index)
      prompt, completion = np.split(example.ids, [example.prompt_length])
      samples.append(
        {
          "prompt": tokens.decode(prompt, skip_special_tokens=False),
          "completion": tokens.decode(completion, skip_special_tokens=False),
          "length": len(completion),
        }
      )
    return samples

  def time_split(
    self, state: TrainState, batch: PackedBatch
  ) -> Mapping[str, float]:
    """The step has no parts that are timed by themselves."""
    return {}

  def work(self, record: Mapping[str, float]) -> Work:
    """Tokens in the rows, and the operations on them."""
    operations = flops.supervised(
      self._setup.student,
      tokens=record["packing/tokens"],
      context=record["packing/context_mean"],
      learned=record["packing/learned"],
      adapters=self.student.lora is not None,
    )
    return Work(tokens=record["packing/tokens"], operations=operations)


def place_rows(batch: PackedBatch, layout: Layout) -> PackedRows:
  """Rows as a global batch: each host places what its devices hold."""
  place = layout.place_rows
  return PackedRows(
    tokens=place(batch.tokens),
    packing=Packing(
      positions=place(batch.positions), segments=place(batch.segments)
    ),
    learned=place(batch.learned),
  )
