"""Keys of what is measured: rewards, held-out loss, accuracy."""

import dataclasses

from opd_jax.config.checks import require
from opd_jax.config.data import SourceConfig
from opd_jax.config.step import SamplingConfig


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
class RewardConfig:
  """The reward of a completion: what a verifier says of it.

  The right answer is `answer` of the prompt's source.

  Attributes:
    verifier: "exact", "number", or "module:function" of your own.
  """

  verifier: str = "number"


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
    require(
      self.source is None or not self.source.given,
      "eval.source.given is for the sources of `train`; leave it out",
    )
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
