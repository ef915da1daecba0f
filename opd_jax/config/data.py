"""Keys about data: sources, templates, what is trained on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from opd_jax.config.checks import require


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
    path: FILE.jsonl or FILE.parquet, here or in a bucket (`gs://...`);
      "tfds:NAME" for a TensorFlow Dataset; or the name of a built-in task,
      "arith".
    split: of a TensorFlow Dataset or a task.
    options: of a task (see its module), or `data_dir` of a TensorFlow Dataset.
    rows: use the first so many; None for all.
    weight: share of this source in the mixture, relative to the others'.
    prompt: what the student continues.
    teacher_prompt: what the teacher reads in front of the same completion;
      None gives it the very ids of the student.
    completion: for `sft`, the text to learn, with fields as in `prompt.text`;
      an end-of-sequence id is put behind it.
    given: the path is a store of the teacher's completions (`generate
      --out=FILE.parquet`), which `rollout` may use in place of the student's.
    answer: for evaluation and rewards, the text handed to the verifier,
      likewise.
  """

  path: str
  split: str = "train"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rows: int | None = None
  weight: float = 1.0
  prompt: TemplateConfig = TemplateConfig()
  teacher_prompt: TemplateConfig | None = None
  completion: str = "{completion}"
  given: bool = False
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
      require(
        not source.given,
        f"data.sources.{name}.given is for `train`; leave it out: `sft` learns "
        "the text of a store's `completion`",
      )
