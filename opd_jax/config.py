"""What a run is made of: frozen dataclasses, filled once by `parsing.py`.

A value out of range raises `InputError` with the dotted name of its key, before
anything touches a device. `None` means off.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from opd_jax.errors import InputError


def require(condition: bool, message: str) -> None:
  """Raises InputError with the message unless the condition holds."""
  if not condition:
    raise InputError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
  """A Hugging Face checkpoint.

  Attributes:
    path: a local folder, or `org/name` or `org/name@revision` in the Hub cache.
    compute_dtype: of activations, and of the weights while they are used. A
      frozen model is held in it; a trained one has float32 master weights.
  """

  path: str
  compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModelSource(ModelSource):
  """A Hugging Face checkpoint to start the training from.

  Attributes:
    remat: what the backward pass recomputes: "none" keeps every activation of
      a layer, "full" keeps a layer's input only, "dots" also keeps products.
  """

  remat: Literal["none", "dots", "full"] = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateConfig:
  """How a row of data becomes the text a model continues.

  Attributes:
    text: with `{field}` for fields of the row, `{{` and `}}` for braces.
    chat: make `text` the user's message in the chat template of the model's
      own tokenizer, up to where the assistant's turn begins.
    system: a system message before it, with fields as in `text`.
    messages: the field that holds a list of {"role", "content"} messages, in
      place of `text` and `system`.
    thinking: the template's `enable_thinking`; None leaves it at its default.
    replace_newlines: what a newline in the text becomes; None keeps it.
    first_tokens: use the first so many ids only (a continuation task); None
      uses all.
  """

  text: str = "{text}"
  chat: bool = False
  system: str | None = None
  messages: str | None = None
  thinking: bool | None = None
  replace_newlines: str | None = None
  first_tokens: int | None = None

  def __post_init__(self):
    for name in ("system", "messages", "thinking"):
      value = getattr(self, name)
      require(
        self.chat or value is None,
        f"prompt.{name} = {value!r} is for chat templates; set prompt.chat to "
        f"True, or prompt.{name} to None",
      )
    require(
      self.messages is None or self.system is None,
      f"prompt.messages = {self.messages!r} holds the system message too; "
      f"prompt.system must be None, got {self.system!r}",
    )
    require(
      self.first_tokens is None or self.first_tokens >= 1,
      f"prompt.first_tokens must be >= 1 or None, got {self.first_tokens}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """Rows of one kind, and what their fields are for.

  Attributes:
    path: FILE.jsonl or FILE.parquet; "tfds:NAME" for a TensorFlow Dataset; or
      the name of a built-in task, "arith".
    split: of a TensorFlow Dataset or a task.
    options: of a task (see its module), or `data_dir` of a TensorFlow Dataset.
    rows: use the first so many; None for all.
    weight: share of this source in the mixture, relative to the others'.
    prompt: what the student continues.
    teacher_prompt: what the teacher reads in front of the same completion;
      None gives it the very ids of the student.
    completion: for `sft`, the text to learn, with fields as in `prompt.text`;
      an end-of-sequence id is put behind it.
    answer: for evaluation, the text handed to the verifier, likewise.
  """

  path: str
  split: str = "train"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rows: int | None = None
  weight: float = 1.0
  prompt: TemplateConfig = TemplateConfig()
  teacher_prompt: TemplateConfig | None = None
  completion: str = "{completion}"
  answer: str = "{answer}"

  def __post_init__(self):
    require(
      self.rows is None or self.rows >= 1,
      f"rows of {self.path} must be >= 1, got {self.rows}; use None for all",
    )
    require(
      self.weight > 0 and math.isfinite(self.weight),
      f"weight of {self.path} must be > 0, got {self.weight}; leave the source "
      "out to switch it off",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What is trained on.

  Attributes:
    sources: by a name of your own; several are mixed by their weights.
    max_prompt_tokens: P, the prompt window of the compiled step.
    overlong: what happens to a prompt longer than the window: keep its last
      ids ("truncate_left"), skip it ("drop"), or stop the run ("error").
    shuffle: a new order each epoch, from the run's seed.
  """

  sources: Mapping[str, SourceConfig]
  max_prompt_tokens: int = 512
  overlong: Literal["truncate_left", "drop", "error"] = "truncate_left"
  shuffle: bool = True

  def __post_init__(self):
    require(
      len(self.sources) >= 1,
      "data.sources must name at least one source, such as "
      '{"mine": {"path": "prompts.jsonl"}}',
    )
    require(
      self.max_prompt_tokens >= 1,
      f"data.max_prompt_tokens must be >= 1, got {self.max_prompt_tokens}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """How the student draws; the default is the pure policy.

  Attributes:
    max_new_tokens: T, completion slots.
    temperature: divides the logits; 0 means greedy. Scores of every model use
      the same temperature (1 when greedy).
    top_k: keep the k likeliest tokens; None for all.
    top_p: keep the smallest set of tokens with at least this mass.
    min_p: keep tokens at least this fraction of the likeliest one's mass.
    stop_ids: ids that end a completion; None takes those of the student's
      generation_config and tokenizer; () never stops early.
  """

  max_new_tokens: int = 128
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  stop_ids: tuple[int, ...] | None = None

  @property
  def is_pure(self) -> bool:
    """Whether tokens are drawn from the whole distribution that is scored."""
    filters = (self.top_k, self.top_p, self.min_p)
    return self.temperature > 0 and all(value is None for value in filters)

  def __post_init__(self):
    require(
      self.max_new_tokens >= 1,
      f"sampling.max_new_tokens must be >= 1, got {self.max_new_tokens}",
    )
    require(
      self.temperature >= 0 and math.isfinite(self.temperature),
      f"sampling.temperature must be >= 0, got {self.temperature}",
    )
    require(
      self.top_k is None or self.top_k >= 1,
      f"sampling.top_k must be >= 1, got {self.top_k}; use None for all",
    )
    for name in ("top_p", "min_p"):
      value = getattr(self, name)
      require(
        value is None or 0 < value <= 1,
        f"sampling.{name} must be in (0, 1], got {value}; use None for off",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
  """How much of it a step holds.

  Attributes:
    prompts: prompts per step, over all devices and hosts.
    rollouts: G, completions per prompt.
    micro_batches: the gradient is accumulated over so many parts of the batch
      inside the compiled step; every normaliser stays global.
    chunk_tokens: next-token distributions that exist at the same time, per
      shard of the batch.
  """

  prompts: int = 16
  rollouts: int = 1
  micro_batches: int = 1
  chunk_tokens: int = 256

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      require(value >= 1, f"batch.{field.name} must be >= 1, got {value}")
    rows = self.prompts * self.rollouts
    require(
      rows % self.micro_batches == 0,
      f"batch.micro_batches={self.micro_batches} does not divide the {rows} "
      "rows (prompts x rollouts); choose a divisor of them",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with warm-up, a schedule and global-norm clipping.

  Attributes:
    learning_rate: peak rate.
    warmup_steps: steps of linear growth up to the peak.
    schedule: after the warm-up, until the last step.
    final_fraction: of the peak rate, reached at the last step by "cosine" and
      "linear".
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled; matrices only, not norms and biases.
    clip_norm: bound of the global gradient norm; None for off.
  """

  learning_rate: float = 1e-5
  warmup_steps: int = 0
  schedule: Literal["constant", "linear", "cosine"] = "constant"
  final_fraction: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float | None = 1.0

  def __post_init__(self):
    require(
      self.learning_rate > 0,
      f"optimizer.learning_rate must be > 0, got {self.learning_rate}",
    )
    require(
      self.warmup_steps >= 0,
      f"optimizer.warmup_steps must be >= 0, got {self.warmup_steps}",
    )
    require(
      0 <= self.final_fraction <= 1,
      f"optimizer.final_fraction must be in [0, 1], got {self.final_fraction}",
    )
    for name in ("b1", "b2"):
      value = getattr(self, name)
      require(
        0 <= value < 1, f"optimizer.{name} must be in [0, 1), got {value}"
      )
    require(self.eps > 0, f"optimizer.eps must be > 0, got {self.eps}")
    require(
      self.weight_decay >= 0,
      f"optimizer.weight_decay must be >= 0, got {self.weight_decay}",
    )
    require(
      self.clip_norm is None or self.clip_norm > 0,
      f"optimizer.clip_norm must be > 0 or None, got {self.clip_norm}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; -1 on one of them takes the remaining devices.

  Attributes:
    replica: data parallel, may span slices.
    fsdp: data parallel with weights and optimizer state spread over it.
    tensor: heads, feed-forward and vocabulary spread over it.
    context: for the sequence; must be 1, nothing is spread over it yet.
    expert: for the experts; likewise.
  """

  replica: int = 1
  fsdp: int = -1
  tensor: int = 1
  context: int = 1
  expert: int = 1

  def __post_init__(self):
    sizes = dataclasses.asdict(self)
    for name, size in sizes.items():
      require(
        size >= 1 or size == -1,
        f"mesh.{name} must be >= 1, or -1 for the rest, got {size}",
      )
    free = [name for name, size in sizes.items() if size == -1]
    require(
      len(free) <= 1, f"only one mesh axis may be -1, got {', '.join(free)}"
    )
    for name in ("context", "expert"):
      require(
        sizes[name] == 1,
        f"mesh.{name} must be 1: nothing is spread over it yet, got "
        f"{sizes[name]}; use fsdp and tensor",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
  """Held-out loss: mean nats per token of the student on texts.

  Attributes:
    path: JSONL file; None switches it off.
    text: the text of a row, with `{field}` for its fields.
    rows: use the first so many rows.
    max_characters: use the first so many characters of each; None for all.
    max_tokens: length of the compiled forward pass; longer texts are cut.
    replace_newlines: what a newline becomes; None keeps it.
    every: steps between measurements; the start and the end always have one.
    batch: texts per forward pass.
  """

  path: str | None = None
  text: str = "{text}"
  rows: int = 100
  max_characters: int | None = None
  max_tokens: int = 256
  replace_newlines: str | None = None
  every: int = 50
  batch: int = 20

  def __post_init__(self):
    for name in ("rows", "every", "batch"):
      value = getattr(self, name)
      require(value >= 1, f"held_out.{name} must be >= 1, got {value}")
    require(
      self.max_characters is None or self.max_characters >= 1,
      f"held_out.max_characters must be >= 1, got {self.max_characters}; "
      "use None for all",
    )
    require(
      self.max_tokens >= 2,
      f"held_out.max_tokens must be >= 2, got {self.max_tokens}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """Evaluation of sampled answers: is the completion right?

  Attributes:
    source: the problems; None switches the evaluation off.
    samples: completions per problem.
    pass_at: the k of pass@k; None for the powers of two up to `samples`.
    verifier: "exact", "number", or "module:function" of your own.
    sampling: how completions are drawn; None takes the run's.
    seed: of the draws: the same seed gives the same completions.
    batch: problems per call of the compiled sampler; all their samples are
      drawn at the same time.
    every: steps between evaluations; the start and the end always have one.
    teacher: evaluate the teacher too, once, before the first step.
  """

  source: SourceConfig | None = None
  samples: int = 4
  pass_at: tuple[int, ...] | None = None
  verifier: str = "number"
  sampling: SamplingConfig | None = None
  seed: int = 0
  batch: int = 64
  every: int = 50
  teacher: bool = False

  def __post_init__(self):
    for name in ("samples", "batch", "every"):
      value = getattr(self, name)
      require(value >= 1, f"eval.{name} must be >= 1, got {value}")
    for k in self.pass_at or ():
      require(
        1 <= k <= self.samples,
        f"eval.pass_at must be in [1, eval.samples = {self.samples}], got {k}: "
        "pass@k needs k samples per problem; raise eval.samples, or lower k",
      )
    require(
      0 <= self.seed < 2**31,
      f"eval.seed must be in [0, 2**31), got {self.seed}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When states are saved, and which are kept.

  Attributes:
    every: steps between checkpoints; the end and SIGTERM always save one.
    keep_latest: the newest n stay.
    keep_best: also the best by accuracy of the evaluation, or by held-out loss
      where there is no evaluation.
  """

  every: int = 100
  keep_latest: int = 2
  keep_best: bool = True

  def __post_init__(self):
    for name in ("every", "keep_latest"):
      value = getattr(self, name)
      require(value >= 1, f"checkpoint.{name} must be >= 1, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  """What a run tells.

  Attributes:
    every: steps between metric records; the device is not waited for between.
    sample_every: steps between decoded samples in the log.
    samples: completions shown each time.
    time_split_every: steps between measurements of the time that sampling and
      teacher scoring take, each run once more as a program of its own; None
      for never, which saves compiling them. `sft` has neither.
    profile_steps: (first, last) step of a profiler trace; None for off.
  """

  every: int = 10
  sample_every: int = 50
  samples: int = 2
  time_split_every: int | None = 100
  profile_steps: tuple[int, ...] | None = None

  def __post_init__(self):
    for name in ("every", "sample_every", "time_split_every"):
      value = getattr(self, name)
      require(
        value is None or value >= 1, f"log.{name} must be >= 1, got {value}"
      )
    require(self.samples >= 0, f"log.samples must be >= 0, got {self.samples}")
    steps = self.profile_steps
    require(
      steps is None or (len(steps) == 2 and 0 <= steps[0] <= steps[1]),
      f"log.profile_steps must be (first, last) or None, got {steps}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreflightConfig:
  """What is looked at before anything is placed on a device.

  Attributes:
    allow: names of errors to go on with.
  """

  allow: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """One experiment.

  Attributes:
    student: is trained; float32 master weights, exported at the end.
    teacher: frozen.
    data: the prompts.
    sampling: how the student draws.
    batch: rows per step.
    objective: `name` of an objective, and its own options.
    optimizer: how the gradient is applied.
    mesh: how many devices each parallel axis has.
    held_out: the loss on held-out texts.
    eval: the accuracy of sampled answers.
    preflight: what is looked at before the run.
    checkpoint: what is saved.
    log: what is told.
    steps: updates to make.
    seed: of the data order and of every draw.
    mode: "fused" runs rollout, scoring and update as one program; "split" as
      two with the host between them. Tokens and weights are the same.
  """

  student: TrainedModelSource
  teacher: ModelSource
  data: DataConfig
  sampling: SamplingConfig = SamplingConfig()
  batch: BatchConfig = BatchConfig()
  objective: Mapping[str, Any]
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  held_out: HeldOutConfig = HeldOutConfig()
  eval: EvalConfig = EvalConfig()
  preflight: PreflightConfig = PreflightConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  steps: int
  seed: int = 0
  mode: Literal["fused", "split"] = "fused"

  def __post_init__(self):
    require(self.steps >= 1, f"steps must be >= 1, got {self.steps}")
    require(
      0 <= self.seed < 2**31, f"seed must be in [0, 2**31), got {self.seed}"
    )
    require(
      isinstance(self.objective.get("name"), str),
      "objective.name must name an objective, got "
      f"{self.objective.get('name')!r}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftDataConfig:
  """What is learned.

  Attributes:
    sources: by a name of your own; several are mixed by their weights. An
      example longer than a packed row is dropped.
    shuffle: a new order each epoch, from the run's seed.
  """

  sources: Mapping[str, SourceConfig]
  shuffle: bool = True

  def __post_init__(self):
    require(
      len(self.sources) >= 1,
      "data.sources must name at least one source, such as "
      '{"mine": {"path": "examples.jsonl"}}',
    )
    for name, source in self.sources.items():
      require(
        source.teacher_prompt is None,
        f"data.sources.{name}.teacher_prompt is for `train`, where a teacher "
        "scores; leave it out",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatchConfig:
  """How many packed rows a supervised step holds.

  Attributes:
    rows: per step, over all devices and hosts.
    row_tokens: S, slots of a row; examples are packed into it whole and do not
      see each other.
    micro_batches: the gradient is accumulated over so many parts of the batch.
    chunk_tokens: next-token distributions that exist at the same time, per
      shard of the batch.
  """

  rows: int = 16
  row_tokens: int = 512
  micro_batches: int = 1
  chunk_tokens: int = 256

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      require(value >= 1, f"batch.{field.name} must be >= 1, got {value}")
    require(
      self.row_tokens >= 2,
      f"batch.row_tokens must be >= 2, got {self.row_tokens}",
    )
    require(
      self.rows % self.micro_batches == 0,
      f"batch.micro_batches={self.micro_batches} does not divide "
      f"batch.rows={self.rows}; choose a divisor",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftStudentSource(TrainedModelSource):
  """What supervised fine-tuning starts from.

  Attributes:
    init: "checkpoint" starts from its weights; "random" draws new ones from
      the seed and takes config.json and the tokenizer only.
  """

  init: Literal["checkpoint", "random"] = "checkpoint"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
  """One supervised fine-tuning.

  Attributes:
    student: is trained; float32 master weights, exported at the end.
    data: the examples: `completion` after `prompt`.
    batch: packed rows per step.
    optimizer: how the gradient is applied.
    mesh: how many devices each parallel axis has.
    held_out: the loss on held-out texts.
    eval: the accuracy of sampled answers.
    checkpoint: what is saved.
    log: what is told.
    steps: updates to make.
    seed: of the data order, of random weights and of every draw.
  """

  student: SftStudentSource
  data: SftDataConfig
  batch: PackedBatchConfig = PackedBatchConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  held_out: HeldOutConfig = HeldOutConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  steps: int
  seed: int = 0

  def __post_init__(self):
    require(self.steps >= 1, f"steps must be >= 1, got {self.steps}")
    require(
      0 <= self.seed < 2**31, f"seed must be in [0, 2**31), got {self.seed}"
    )
