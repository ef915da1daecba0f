"""Keys of a step: models, sampling, batch, optimizer, mesh."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from opd_jax.config.checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
  """A Hugging Face checkpoint.

  Attributes:
    path: a local folder, `gs://bucket/folder`, or `org/name` or
      `org/name@revision` in the Hub cache.
    compute_dtype: of activations, and of the weights while they are used. A
      frozen model is held in it; a trained one has float32 master weights.
  """

  path: str
  compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenModelSource(ModelSource):
  """A Hugging Face checkpoint that stays as it is.

  Attributes:
    weight_dtype: "int8" holds the kernels of the layers as int8 with a scale
      per output channel, quantized as they are read; activations keep the
      compute dtype. None holds all weights in that.
    offload: the kernels of the layers lie in the memory of the hosts, and come
      to the devices layer by layer in every pass; what draws no tokens only.
  """

  weight_dtype: Literal["int8"] | None = None
  offload: bool = False

  def __post_init__(self):
    require(
      not (self.offload and self.weight_dtype == "int8"),
      f'{self.path}: offload = True with weight_dtype = "int8" would bring all '
      "layers to the device at once; leave out one of the two",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Low-rank adapters (arXiv:2106.09685), without dropout.

  Attributes:
    rank: r, of each adapter.
    alpha: what an adapter adds is multiplied by alpha / rank.
    targets: products that get one, by the names of PEFT, such as "q_proj"; or
      "all-linear" for all that may have one.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = ("all-linear",)

  def __post_init__(self):
    require(self.rank >= 1, f"student.lora.rank must be >= 1, got {self.rank}")
    require(
      self.alpha > 0 and math.isfinite(self.alpha),
      f"student.lora.alpha must be > 0, got {self.alpha}",
    )
    require(
      len(self.targets) == len(set(self.targets)) > 0,
      "student.lora.targets must be different names of products, such as "
      f'("q_proj", "v_proj") or ("all-linear",), got {self.targets!r}',
    )
    require(
      "all-linear" not in self.targets or len(self.targets) == 1,
      'student.lora.targets: "all-linear" stands alone, got '
      f"{self.targets!r}; leave out the others",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModelSource(ModelSource):
  """A Hugging Face checkpoint to start the training from.

  Attributes:
    remat: what the backward pass recomputes: "none" keeps every activation of
      a layer, "full" keeps a layer's input only, "dots" also keeps products.
    lora: low-rank adapters to train in place of the weights, which stay as
      they are, in `compute_dtype`; None to train all weights.
  """

  remat: Literal["none", "dots", "full"] = "none"
  lora: LoraConfig | None = None

  def as_frozen(self) -> FrozenModelSource:
    """The same checkpoint as it is held where it is not trained."""
    return FrozenModelSource(path=self.path, compute_dtype=self.compute_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftStudentSource(TrainedModelSource):
  """What supervised fine-tuning starts from.

  Attributes:
    init: "checkpoint" starts from its weights; "random" draws new ones from
      the seed and takes config.json and the tokenizer only.
  """

  init: Literal["checkpoint", "random"] = "checkpoint"

  def __post_init__(self):
    require(
      self.lora is None or self.init == "checkpoint",
      'student.init = "random", and student.lora would train adapters of '
      "weights that are random; set student.lora to None, or "
      'init to "checkpoint"',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """How the student draws; the default is the pure policy.

  Attributes:
    max_new_tokens: T, completion slots.
    temperature: divides the logits; 0 means greedy, which objectives that learn
      from drawn tokens refuse. Scores of every model use the same temperature
      (1 when greedy).
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
    mini_batches: parts of the rollout batch that get an update each, by whole
      prompts; means and normalisers are those of the part.
    epochs: passes over the rollout batch; a step makes mini_batches x epochs
      updates.
    micro_batches: the gradient of an update is accumulated over so many parts
      of its batch inside the compiled step; every normaliser stays global.
    chunk_tokens: next-token distributions that exist at the same time, per
      shard of the batch and of the sequence.
  """

  prompts: int = 16
  rollouts: int = 1
  mini_batches: int = 1
  epochs: int = 1
  micro_batches: int = 1
  chunk_tokens: int = 256

  @property
  def updates(self) -> int:
    """Updates per step."""
    return self.mini_batches * self.epochs

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      require(value >= 1, f"batch.{field.name} must be >= 1, got {value}")
    require(
      self.prompts % self.mini_batches == 0,
      f"batch.mini_batches={self.mini_batches} does not divide "
      f"batch.prompts={self.prompts}; choose a divisor of it, since the "
      "rollouts of a prompt stay together",
    )
    rows = self.prompts // self.mini_batches * self.rollouts
    require(
      rows % self.micro_batches == 0,
      f"batch.micro_batches={self.micro_batches} does not divide the {rows} "
      "rows of an update (prompts x rollouts / mini_batches); choose a divisor "
      "of them",
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
      shard of the batch and of the sequence.
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
class OptimizerConfig:
  """AdamW with warm-up, a schedule and global-norm clipping.

  Attributes:
    learning_rate: peak rate.
    warmup_steps: steps of linear growth up to the peak. All schedules are of
      steps; several updates of a step lie evenly between it and the next.
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
  """Sizes of the mesh axes, and what is spread over them.

  A size of -1, on one axis, takes the remaining devices.

  Attributes:
    replica: data parallel. Several slices are spanned by it as far as it is a
      multiple of them, by fsdp otherwise.
    fsdp: data parallel with weights and optimizer state spread over it.
    tensor: heads, feed-forward and vocabulary spread over it.
    context: slots of the rows spread over it, and of the cache.
    expert: data parallel, and the experts of a mixture spread over it.
    train_rules: by name of a dimension, the mesh axes that it is spread over in
      training, in place of the default: `{"vocab": ["tensor", "fsdp"],
      "embed": []}`. Names and defaults are in `docs/design.md`.
    decode_rules: the same while tokens are drawn.
  """

  replica: int = 1
  fsdp: int = -1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  train_rules: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  decode_rules: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def sizes(self) -> dict[str, int]:
    """The sizes by axis."""
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if not field.name.endswith("_rules")
    }

  def __post_init__(self):
    sizes = self.sizes
    for name, size in sizes.items():
      require(
        size >= 1 or size == -1,
        f"mesh.{name} must be >= 1, or -1 for the rest, got {size}",
      )
    free = [name for name, size in sizes.items() if size == -1]
    require(
      len(free) <= 1, f"only one mesh axis may be -1, got {', '.join(free)}"
    )
    for key in ("train_rules", "decode_rules"):
      for name, axes in getattr(self, key).items():
        require(
          isinstance(axes, list | tuple)
          and all(axis in sizes for axis in axes)
          and len(set(axes)) == len(axes),
          f"mesh.{key}.{name} must list mesh axes, each of "
          f"{', '.join(sizes)} at most once, got {axes!r}; [] spreads it over "
          "none",
        )
