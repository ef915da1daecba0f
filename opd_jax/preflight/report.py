"""What preflight finds, and how it is told."""

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from opd_jax.errors import InputError

Severity = Literal["error", "warning"]

# Every finding there is: its name, how bad it is, and what it means.
KINDS: Mapping[str, tuple[Severity, str]] = {
  "tokenizers_differ": (
    "error",
    "an id, or the ids of a text, are not the same for student and teacher",
  ),
  "tokenizer_exceeds_model": (
    "error",
    "a tokenizer has ids that its own model has no row for",
  ),
  "bos_doubled": ("error", "a prompt begins with two bos ids"),
  "bos_differs": (
    "error",
    "one of the two prompts of a row begins with a bos id, the other not",
  ),
  "thinking_differs": (
    "error",
    "the prompts of student and teacher open the assistant's turn with "
    "different thinking parts",
  ),
  "end_of_turn_not_stop": (
    "error",
    "the chat template ends a turn with an id that does not end a completion",
  ),
  "stop_row_zero": (
    "error",
    "the student's output row of a stop id is all zeros: never trained",
  ),
  "eos_never_drawn": (
    "error",
    "no sampled completion of the student ended at a stop id (probe)",
  ),
  "eval_rows_in_training": (
    "error",
    "rows of the evaluation or the held-out texts are in the training data",
  ),
  "store_of_another_model": (
    "error",
    "given completions were written by other weights than the teacher's",
  ),
  "memory_exceeded": (
    "error",
    "weights and optimizer state alone do not fit on a device",
  ),
  "ids_without_teacher": (
    "warning",
    "the student's tokenizer has ids that the teacher has no row for",
  ),
  "special_ids_differ": (
    "warning",
    "bos, eos, pad or unk have another id in the teacher's tokenizer",
  ),
  "stop_ids_differ": (
    "warning",
    "student and teacher end a text at different ids",
  ),
  "stop_ids_unusual": (
    "warning",
    "sampling.stop_ids are not those the student's checkpoint names",
  ),
  "no_stop_id": ("warning", "the student's checkpoint names no stop id"),
  "chat_templates_differ": (
    "warning",
    "the teacher reads the student's ids, and its own chat template would "
    "have given others",
  ),
  "chat_prompts_truncated": (
    "warning",
    "chat prompts longer than the window lose their first ids",
  ),
  "memory_tight": (
    "warning",
    "the estimate for a whole step is more than a device offers",
  ),
  "eos_unclear": (
    "warning",
    "no sampled completion ended at a stop id, but they were cut short (probe)",
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """Something that is wrong, or may be.

  Attributes:
    name: a key of `KINDS`.
    message: the value found, and what to do about it.
  """

  name: str
  message: str

  @property
  def severity(self) -> Severity:
    """Whether a run must not start with it."""
    return KINDS[self.name][0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """One subject of the report.

  Attributes:
    title: of it.
    lines: for people.
    figures: for programs; JSON.
    findings: about it.
  """

  title: str
  lines: tuple[str, ...]
  figures: Mapping[str, Any]
  findings: tuple[Finding, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """All that preflight has to tell.

  Attributes:
    sections: by subject.
    allow: names of errors that the run goes on with.
  """

  sections: tuple[Section, ...]
  allow: tuple[str, ...] = ()

  def __post_init__(self):
    for name in self.allow:
      if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
          f"preflight.allow names {name!r}, which is no finding{hint}; known: "
          f"{', '.join(KINDS)}"
        )

  @property
  def findings(self) -> tuple[Finding, ...]:
    """Of all sections, errors first."""
    found = itertools.chain(*(section.findings for section in self.sections))
    return tuple(sorted(found, key=lambda finding: finding.severity))

  def lines(self) -> Iterator[str]:
    """The whole report for people."""
    for section in self.sections:
      yield section.title
      yield from (f"  {line}".rstrip() for line in section.lines)
      yield ""
    yield "findings"
    yield from (f"  {line}" for line in self.brief())

  def brief(self) -> Iterator[str]:
    """The findings alone, one a line."""
    if not self.findings:
      yield "nothing found"
    for finding in self.findings:
      allowed = " (allowed)" if finding.name in self.allow else ""
      yield f"{finding.severity} {finding.name}{allowed}: {finding.message}"

  def figures(self) -> dict[str, Any]:
    """The report for programs, as JSON."""
    return {
      "findings": [
        {
          "name": finding.name,
          "severity": finding.severity,
          "allowed": finding.name in self.allow,
          "message": finding.message,
        }
        for finding in self.findings
      ],
      **{section.title: dict(section.figures) for section in self.sections},
    }

  def enforce(self) -> None:
    """Raises InputError if there are errors that are not allowed."""
    errors = [
      finding
      for finding in self.findings
      if finding.severity == "error" and finding.name not in self.allow
    ]
    if errors:
      names = tuple(dict.fromkeys(finding.name for finding in errors))
      told = "; ".join(f"{found.name}: {found.message}" for found in errors)
      raise InputError(
        f"preflight found {len(errors)} error{'s' * (len(errors) > 1)}: {told}"
        f" (to go on all the same: preflight.allow = {names!r})"
      )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of cells in columns, each as wide as its widest cell."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  ]
