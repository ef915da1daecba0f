"""What a run is made of: frozen dataclasses, parsed once from a ConfigDict.

Unknown keys, wrong types and values out of range raise `InputError` here, with
the dotted name of the key, before anything touches a device. `None` means off.
"""

import ast
import dataclasses
import difflib
import math
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opd_jax.errors import InputError


def _require(condition: bool, message: str) -> None:
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
class DataConfig:
  """Prompts from a JSONL file.

  Attributes:
    path: JSONL file, one object a line.
    field: the field that holds the prompt's text.
    replace_newlines: what a newline in the text becomes; None keeps it.
    prompt_tokens: use the first so many ids of the text as the prompt (a
      continuation task); None uses the whole text.
    max_prompt_tokens: P, the prompt window of the compiled step.
    overlong: what happens to a prompt longer than the window: keep its last
      ids ("truncate_left"), skip it ("drop"), or stop the run ("error").
    shuffle: a new order each epoch, from the run's seed.
  """

  path: str
  field: str = "text"
  replace_newlines: str | None = None
  prompt_tokens: int | None = None
  max_prompt_tokens: int = 512
  overlong: Literal["truncate_left", "drop", "error"] = "truncate_left"
  shuffle: bool = True

  def __post_init__(self):
    _require(
      self.max_prompt_tokens >= 1,
      f"data.max_prompt_tokens must be >= 1, got {self.max_prompt_tokens}",
    )
    _require(
      self.prompt_tokens is None or self.prompt_tokens >= 1,
      f"data.prompt_tokens must be >= 1 or None, got {self.prompt_tokens}",
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

  def __post_init__(self):
    _require(
      self.max_new_tokens >= 1,
      f"sampling.max_new_tokens must be >= 1, got {self.max_new_tokens}",
    )
    _require(
      self.temperature >= 0 and math.isfinite(self.temperature),
      f"sampling.temperature must be >= 0, got {self.temperature}",
    )
    _require(
      self.top_k is None or self.top_k >= 1,
      f"sampling.top_k must be >= 1, got {self.top_k}; use None for all",
    )
    for name in ("top_p", "min_p"):
      value = getattr(self, name)
      _require(
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
      _require(value >= 1, f"batch.{field.name} must be >= 1, got {value}")
    rows = self.prompts * self.rollouts
    _require(
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
    _require(
      self.learning_rate > 0,
      f"optimizer.learning_rate must be > 0, got {self.learning_rate}",
    )
    _require(
      self.warmup_steps >= 0,
      f"optimizer.warmup_steps must be >= 0, got {self.warmup_steps}",
    )
    _require(
      0 <= self.final_fraction <= 1,
      f"optimizer.final_fraction must be in [0, 1], got {self.final_fraction}",
    )
    for name in ("b1", "b2"):
      value = getattr(self, name)
      _require(
        0 <= value < 1, f"optimizer.{name} must be in [0, 1), got {value}"
      )
    _require(self.eps > 0, f"optimizer.eps must be > 0, got {self.eps}")
    _require(
      self.weight_decay >= 0,
      f"optimizer.weight_decay must be >= 0, got {self.weight_decay}",
    )
    _require(
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
      _require(
        size >= 1 or size == -1,
        f"mesh.{name} must be >= 1, or -1 for the rest, got {size}",
      )
    free = [name for name, size in sizes.items() if size == -1]
    _require(
      len(free) <= 1, f"only one mesh axis may be -1, got {', '.join(free)}"
    )
    for name in ("context", "expert"):
      _require(
        sizes[name] == 1,
        f"mesh.{name} must be 1: nothing is spread over it yet, got "
        f"{sizes[name]}; use fsdp and tensor",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """Held-out loss: mean nats per token of the student on texts.

  Attributes:
    path: JSONL file; None switches the evaluation off.
    field: the field that holds the text.
    rows: use the first so many rows.
    max_characters: use the first so many characters of each; None for all.
    max_tokens: length of the compiled evaluation; longer texts are cut.
    replace_newlines: what a newline becomes; None keeps it.
    every: steps between evaluations; the start and the end always have one.
    batch: texts per forward pass.
  """

  path: str | None = None
  field: str = "text"
  rows: int = 100
  max_characters: int | None = None
  max_tokens: int = 256
  replace_newlines: str | None = None
  every: int = 50
  batch: int = 20

  def __post_init__(self):
    for name in ("rows", "every", "batch"):
      value = getattr(self, name)
      _require(value >= 1, f"eval.{name} must be >= 1, got {value}")
    _require(
      self.max_tokens >= 2,
      f"eval.max_tokens must be >= 2, got {self.max_tokens}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When states are saved, and which are kept.

  Attributes:
    every: steps between checkpoints; the end and SIGTERM always save one.
    keep_latest: the newest n stay.
    keep_best: also the best by held-out loss, if there is an evaluation.
  """

  every: int = 100
  keep_latest: int = 2
  keep_best: bool = True

  def __post_init__(self):
    for name in ("every", "keep_latest"):
      value = getattr(self, name)
      _require(value >= 1, f"checkpoint.{name} must be >= 1, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  """What a run tells.

  Attributes:
    every: steps between metric records; the device is not waited for between.
    sample_every: steps between decoded samples in the log.
    samples: completions shown each time.
    time_split_every: steps between measurements of the time that sampling and
      teacher scoring take, each run once more as a program of its own; None
      for never, which saves compiling them.
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
      _require(
        value is None or value >= 1, f"log.{name} must be >= 1, got {value}"
      )
    _require(self.samples >= 0, f"log.samples must be >= 0, got {self.samples}")
    steps = self.profile_steps
    _require(
      steps is None or (len(steps) == 2 and 0 <= steps[0] <= steps[1]),
      f"log.profile_steps must be (first, last) or None, got {steps}",
    )


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
    eval: the held-out loss.
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
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  steps: int
  seed: int = 0
  mode: Literal["fused", "split"] = "fused"

  def __post_init__(self):
    _require(self.steps >= 1, f"steps must be >= 1, got {self.steps}")
    _require(
      0 <= self.seed < 2**31, f"seed must be in [0, 2**31), got {self.seed}"
    )
    _require(
      isinstance(self.objective.get("name"), str),
      "objective.name must name an objective, got "
      f"{self.objective.get('name')!r}",
    )


def load(location: str, overrides: Sequence[str] = ()) -> RunConfig:
  """Reads an experiment: a Python file that defines `get_config`.

  Args:
    location: "FILE.py", or "FILE.py:ARG" for `get_config(ARG)`.
    overrides: "dotted.key=value" each, set after the file has been read. A
      value is a Python literal, or else a string.

  Raises:
    InputError: no such file, a file that does not run or gives no config, or
      whatever `parse` complains about.
  """
  path, _, argument = location.partition(":")
  if not Path(path).is_file():
    raise InputError(
      f"no config file {path!r}; give a Python file that defines get_config, "
      "such as configs/tinystories_babyllama.py"
    )
  # A config file is the user's own program: what it raises is shown whole.
  get_config = runpy.run_path(path).get("get_config")
  if not callable(get_config):
    raise InputError(
      f"{path} defines no function get_config; write one that returns the "
      "experiment as a ConfigDict, as in configs/tinystories_babyllama.py"
    )
  values = get_config(argument) if argument else get_config()
  if not hasattr(values, "items"):
    raise InputError(
      f"get_config of {path} must return a ConfigDict or a dict, got "
      f"{type(values).__name__}"
    )
  values = _plain(values)
  for override in overrides:
    _override(values, override)
  return parse(RunConfig, values)


def _plain(values: Any) -> Any:
  """Nested dicts of a ConfigDict."""
  if not hasattr(values, "items"):
    return values
  return {key: _plain(value) for key, value in values.items()}


def _override(values: dict[str, Any], override: str) -> None:
  name, found, text = override.partition("=")
  _require(
    bool(found), f"--config.{name} has no value; write --config.{name}=VALUE"
  )
  try:
    value = ast.literal_eval(text)
  except (SyntaxError, ValueError):
    value = text
  *groups, key = name.split(".")
  for group in groups:
    values = values.setdefault(group, {})
    _require(
      isinstance(values, dict),
      f"--config.{name}: {group} is not a group of keys but {values!r}; see "
      "opd_jax/config.py for the keys there are",
    )
  values[key] = value


def parse(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
  """Builds a config dataclass from nested mappings, checking every key.

  Args:
    cls: a config dataclass; fields may be dataclasses themselves.
    values: a ConfigDict or dict.
    prefix: dotted name of `values` in the whole config, for messages.

  Raises:
    InputError: unknown key (with the nearest known one), missing key, wrong
      type, value out of range.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f"did you mean {prefix}{near[0]}? " if near else ""
      raise InputError(
        f"unknown config key {prefix}{key}; {hint}known keys: "
        f"{', '.join(sorted(fields))}"
      )
  arguments = {}
  for name, field in fields.items():
    if name in values:
      arguments[name] = _convert(hints[name], values[name], prefix + name)
    elif (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise InputError(f"config key {prefix}{name} is missing")
  try:
    return cls(**arguments)
  except InputError:
    raise
  except ValueError as error:
    raise InputError(f"{prefix.rstrip('.')}: {error}") from error


def _convert(hint: Any, value: Any, name: str) -> Any:
  """Checks a value against a field's type; int becomes float where asked."""
  if dataclasses.is_dataclass(hint) and isinstance(hint, type):
    if isinstance(value, hint):
      return value
    _require(
      isinstance(value, Mapping) or hasattr(value, "items"),
      f"{name} must be a group of keys, got {value!r}",
    )
    return parse(hint, dict(value.items()), f"{name}.")
  if _matches(hint, value):
    if isinstance(value, list):
      return tuple(value)
    return value
  if _matches(hint, 0.0) and type(value) is int:
    return float(value)
  raise InputError(
    f"{name} must be {_describe(hint)}, got {value!r} ({type(value).__name__})"
  )


def _matches(hint: Any, value: Any) -> bool:
  origin = typing.get_origin(hint)
  if origin is Literal:
    return value in typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    return any(_matches(option, value) for option in typing.get_args(hint))
  if origin is tuple:
    (item, _) = typing.get_args(hint)
    return isinstance(value, tuple | list) and all(
      _matches(item, element) for element in value
    )
  if origin is Mapping:
    return isinstance(value, Mapping) or hasattr(value, "items")
  if hint is type(None):
    return value is None
  if hint in (int, float):
    return type(value) is hint
  return isinstance(value, hint)


def _describe(hint: Any) -> str:
  origin = typing.get_origin(hint)
  if origin is Literal:
    return "one of " + ", ".join(repr(item) for item in typing.get_args(hint))
  if origin in (types.UnionType, typing.Union):
    return " or ".join(_describe(option) for option in typing.get_args(hint))
  if hint is type(None):
    return "None"
  return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
