"""What a run ends with: figures for programs, and lines for people."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Values = Mapping[str, float]

EXAMPLES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """What a run ends with; `to_json` of it is `summary.json` in its folder.

  Attributes:
    step: updates done.
    signal: that ended the run before its last step; None if it is finished.
    samples: per problem, of the evaluation.
    teacher: what was measured of the teacher, by metric.
    before: what was measured of the student as it came.
    after: the same at the end.
    examples_before: answers of the student as it came.
    examples_after: answers to the same problems at the end.
    seconds: of all the run's processes up to here, compilation included.
    compile_seconds: of them, for the step.
    export: folder of the Hugging Face checkpoint.
  """

  step: int
  signal: int | None
  samples: int
  teacher: Values
  before: Values
  after: Values
  examples_before: Sequence[Mapping[str, Any]]
  examples_after: Sequence[Mapping[str, Any]]
  seconds: float
  compile_seconds: float
  export: str | None

  @property
  def finished(self) -> bool:
    """Whether all updates are done."""
    return self.signal is None

  def to_json(self) -> dict[str, Any]:
    """The figures; `teacher`, `student_before` and `student_after` if measured.

    `{"teacher": {"avg_at_8": 0.98, "low": 0.97, "high": 0.99}, ...}`, where 8
    is the number of samples and `low`, `high` a 95 % interval.
    """
    figures: dict[str, Any] = {}
    for name, values, stage in (
      ("teacher", self.teacher, "teacher"),
      ("student_before", self.before, "eval"),
      ("student_after", self.after, "eval"),
    ):
      if f"{stage}/accuracy" in values:
        figures[name] = {
          f"avg_at_{self.samples}": values[f"{stage}/accuracy"],
          "low": values[f"{stage}/accuracy_low"],
          "high": values[f"{stage}/accuracy_high"],
        }
    return {
      **figures,
      "seconds": self.seconds,
      "compile_seconds": self.compile_seconds,
      "export": self.export,
      "step": self.step,
      "finished": self.finished,
      "before": dict(self.before),
      "after": dict(self.after),
      "examples": {
        "before": list(self.examples_before),
        "after": list(self.examples_after),
      },
    }

  def lines(self) -> Iterator[str]:
    """What a finished run tells on the screen."""
    if "held_out/loss" in self.before:
      yield (
        f"held-out loss {self.before['held_out/loss']:.4f} -> "
        f"{self.after['held_out/loss']:.4f} nats per token"
      )
    yield from self._table()
    for before, after in zip(
      self.examples_before, self.examples_after, strict=True
    ):
      yield f"{_line(after['prompt'])}  (right: {_line(after['answer'])})"
      yield f"  before  {_line(before['text'])}  [{_verdict(before)}]"
      yield f"  after   {_line(after['text'])}  [{_verdict(after)}]"
    yield (
      f"{self.step} steps in {self.seconds:.0f} s, "
      f"{self.compile_seconds:.0f} s of them compiling the step"
    )
    yield f"Hugging Face checkpoint: {self.export}"

  def _table(self) -> Iterator[str]:
    figures = self.to_json()
    rows = [
      (label, figures[key])
      for label, key in (
        ("teacher", "teacher"),
        ("student before", "student_before"),
        ("student after", "student_after"),
      )
      if key in figures
    ]
    if rows:
      yield f"{'':16}avg@{self.samples:<6}95 % interval"
    for label, values in rows:
      share, low, high = (100 * value for value in values.values())
      yield f"{label:16}{share:5.1f} %   {low:.1f} to {high:.1f} %"


def _line(text: str) -> str:
  """A text on one line; the middle of a long one is left out."""
  text = " ".join(text.split())
  return text if len(text) <= 70 else f"{text[:34]} ... {text[-31:]}"


def _verdict(example: Mapping[str, Any]) -> str:
  score = example["score"]
  return {0.0: "wrong", 1.0: "right"}.get(score, f"score {score:.2f}")
