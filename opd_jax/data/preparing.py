"""Rows of a source as the ids that models read.

What a process makes of its rows of a source is a `Share`, which it sends to the
others.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from opd_jax import templates
from opd_jax.config import DataConfig
from opd_jax.data import sources
from opd_jax.data.files import Row
from opd_jax.data.ragged import Ragged
from opd_jax.errors import InputError
from opd_jax.templates import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptReport:
  """What became of the rows of a source, or of all; lengths in ids.

  Attributes:
    rows: that were read.
    kept: used as prompts, the truncated ones included.
    truncated: longer than the window, first ids cut off.
    dropped: longer than the window, not used.
    empty: without a single id, not used.
    longest: the student's longest prompt before any cut to the window.
    mean_length: of the student's prompts as used; 0 if there is none.
    given_cut: given completions longer than sampling.max_new_tokens, whose
      first ids alone are used, as if they had been drawn with that limit.
  """

  rows: int
  kept: int
  truncated: int
  dropped: int
  empty: int
  longest: int
  mean_length: float
  given_cut: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """A row of a source and what is made of it, before any cut to the window.

  Attributes:
    source: its name in `data.sources`.
    index: of the row in its source, from 0.
    where: the row in words.
    row: its fields.
    student: the student's prompt.
    teacher: the teacher's; None if it reads the student's ids.
    given: the completion of a source that is `given`; else None.
  """

  source: str
  index: int
  where: str
  row: Row
  student: Prompt
  teacher: Prompt | None
  given: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids:
  """The ids of a row as both models read them, and those that are given.

  `teacher` is the array of the student where it reads the same; `answer` is
  None where nobody asks for it.
  """

  student: np.ndarray
  teacher: np.ndarray
  given: np.ndarray
  answer: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """What a process made of its rows of a source, as it is sent."""

  index: tuple[int, ...]
  student: Ragged
  teacher: Ragged | None
  given: Ragged
  answers: tuple[str | None, ...]
  report: PromptReport

  @classmethod
  def of(cls, kept: Mapping[int, Ids], report: PromptReport) -> "Share":
    """Of the rows that are used, by their index in the source."""
    rows = list(kept.values())
    same = all(ids.teacher is ids.student for ids in rows)
    return cls(
      index=tuple(kept),
      student=Ragged.of([ids.student for ids in rows]),
      teacher=None if same else Ragged.of([ids.teacher for ids in rows]),
      given=Ragged.of([ids.given for ids in rows]),
      answers=tuple(ids.answer for ids in rows),
      report=report,
    )

  def rows(self) -> Iterator[tuple[int, Ids]]:
    """Index in the source and ids of every row; the inverse of `of`."""
    student = self.student.rows()
    teacher = student if self.teacher is None else self.teacher.rows()
    for index, *ids, answer in zip(
      self.index, student, teacher, self.given.rows(), self.answers, strict=True
    ):
      read, scored, given = ids
      yield (
        index,
        Ids(student=read, teacher=scored, given=given, answer=answer),
      )


def prepare(
  config: DataConfig,
  examples: Iterator[Example],
  vocab_size: int,
  teacher_vocab_size: int,
  completion_tokens: int,
  answer: str | None,
) -> tuple[dict[int, Ids], PromptReport]:
  """Cuts the prompts of a source to their window.

  Args:
    config: the window, and what becomes of longer prompts.
    examples: the rows.
    vocab_size: ids that the student has.
    teacher_vocab_size: ids that the teacher has.
    completion_tokens: the most of a given completion.
    answer: template of the answers; None where nobody asks for them.

  Returns:
    Ids that are used, by the row's index in the source, and the counts.

  Raises:
    InputError: see `prompts.Prompts`.
  """
  window = config.max_prompt_tokens
  kept: dict[int, Ids] = {}
  count = empty = overlong = longest = cut = 0
  for example in examples:
    student = example.student.ids
    teacher = example.teacher.ids if example.teacher else ()
    sources.check_ids(student, vocab_size, example.where)
    sources.check_ids(teacher, teacher_vocab_size, example.where)
    given = example.given or ()
    sources.check_ids(given, vocab_size, example.where)
    count += 1
    longest = max(longest, len(student))
    if max(len(student), len(teacher)) > window:
      if config.overlong == "error":
        _refuse_overlong(example, window)
      overlong += 1
      if config.overlong == "drop":
        continue
      if given and len(student) > window:
        raise InputError(
          f"{example.where}: the prompt has {len(student)} tokens, and the "
          "completion that is given for it was written behind all of them, not "
          f"behind the last {window}; raise data.max_prompt_tokens, or set "
          'data.overlong to "drop"'
        )
    if not student or (example.teacher and not teacher):
      empty += 1
      continue
    ids = np.asarray(student[-window:], np.int32)
    cut += len(given) > completion_tokens
    kept[example.index] = Ids(
      student=ids,
      teacher=np.asarray(teacher[-window:], np.int32)
      if example.teacher
      else ids,
      given=np.asarray(given[:completion_tokens], np.int32),
      answer=None
      if answer is None
      else templates.fill(answer, example.row, example.where),
    )
  dropped = overlong if config.overlong == "drop" else 0
  lengths = [len(ids.student) for ids in kept.values()]
  return kept, PromptReport(
    rows=count,
    kept=len(kept),
    truncated=overlong - dropped,
    dropped=dropped,
    empty=empty,
    longest=longest,
    mean_length=sum(lengths) / max(1, len(lengths)),
    given_cut=cut,
  )


def _refuse_overlong(example: Example, window: int) -> None:
  whose, length = "the prompt", len(example.student.ids)
  if length <= window and example.teacher is not None:
    whose, length = "the teacher's prompt", len(example.teacher.ids)
  raise InputError(
    f"{example.where}: {whose} has {length} tokens, data.max_prompt_tokens is "
    f"{window}; raise it, shorten the prompt, or set data.overlong to "
    '"truncate_left" or "drop"'
  )


def total(reports: Sequence[PromptReport]) -> PromptReport:
  """What became of the rows of all reports together."""

  def added(name: str) -> int:
    return sum(getattr(report, name) for report in reports)

  kept = added("kept")
  return PromptReport(
    rows=added("rows"),
    kept=kept,
    truncated=added("truncated"),
    dropped=added("dropped"),
    empty=added("empty"),
    longest=max(report.longest for report in reports),
    mean_length=sum(r.kept * r.mean_length for r in reports) / max(1, kept),
    given_cut=added("given_cut"),
  )
