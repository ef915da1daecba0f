"""The first prompts as student and teacher read them, side by side."""

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from opd_jax import templates
from opd_jax.config import SourceConfig, TemplateConfig
from opd_jax.data import sources
from opd_jax.preflight.report import table
from opd_jax.setup import Setup
from opd_jax.templates import Prompt
from opd_jax.tokenizer import Tokenizer

CONTEXT = 30
_SHOWN = 240
_WIDTH = 74
_EDGE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """The prompts of one row.

  Attributes:
    source: name of its source.
    where: the row, in words.
    row: its fields.
    student: what the student continues.
    teacher: what the teacher reads; None for the student's very ids.
    own: what the teacher's own tokenizer makes of the student's template;
      None where `teacher` is set, and where it has no chat template.
  """

  source: str
  where: str
  row: dict[str, Any]
  student: Prompt
  teacher: Prompt | None
  own: Prompt | None

  @property
  def teacher_ids(self) -> tuple[int, ...]:
    """The ids that the teacher reads."""
    return (self.teacher or self.student).ids

  @property
  def other(self) -> Prompt | None:
    """What the teacher reads, or would read by its own template."""
    return self.teacher or self.own


def examples(setup: Setup, count: int) -> list[Example]:
  """The first rows of each source that are used, rendered and cut.

  Raises:
    InputError: a template that does not fit the row or a tokenizer.
  """
  data = setup.config.data
  found = []
  for name, source in data.sources.items():
    rendered = (
      _render(setup, name, source, row, sources.where(source, index))
      for index, row in enumerate(sources.read(source))
    )
    used = (
      example
      for example in rendered
      if 0 < len(example.student.ids) <= data.max_prompt_tokens
    )
    found += itertools.islice(used, count)
  return found


def boundary(setup: Setup, example: Example, drawn: Sequence[int]) -> list[str]:
  """Where prompt and completion meet, position by position.

  Args:
    setup: of the run.
    example: a row.
    drawn: the first ids of a completion; without them the slots are named.
  """
  rows = [("position", "student", "position", "teacher", "")]
  prompts = (example.student.ids, example.teacher_ids)
  tokens = (setup.tokenizer, setup.teacher_tokenizer)
  for back in range(min(_EDGE, *map(len, prompts)), 0, -1):
    ours, theirs = (ids[-back] for ids in prompts)
    rows.append(
      (
        f"{len(prompts[0]) - back}",
        token(tokens[0], ours),
        f"{len(prompts[1]) - back}",
        token(tokens[1], theirs),
        "prompt" if ours == theirs else "prompt, differs",
      )
    )
  for index in range(_EDGE):
    ours = theirs = "the drawn id"
    if drawn:
      if index >= len(drawn):
        break
      ours, theirs = (token(side, drawn[index]) for side in tokens)
    first, second = (f"{len(ids) + index}" for ids in prompts)
    rows.append((first, ours, second, theirs, f"completion {index}"))
  return [f"where prompt and completion meet ({example.where}):", *table(rows)]


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int | None:
  """The first index at which two sequences differ; None if they are equal."""
  for index, (left, right) in enumerate(zip(ours, theirs, strict=False)):
    if left != right:
      return index
  return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def side_by_side(setup: Setup, example: Example) -> Iterator[str]:
  """Both prompts as the models read them, and where they part."""
  yield f"source {example.source}, {example.where}"
  ours = example.student.ids
  text = decode(setup.tokenizer, ours)
  yield f"student reads {len(ours)} ids"
  yield from _quoted(text)
  if example.teacher is not None:
    yield f"teacher reads {len(example.teacher.ids)} ids"
  else:
    yield "teacher reads the same ids"
  other = example.other
  if other is None:
    yield "(its tokenizer has no chat template of its own)"
    return
  other_text = decode(setup.teacher_tokenizer, other.ids)
  slot = first_difference(ours, other.ids)
  if slot is None:
    yield "(its own tokenizer and template give the same)"
    return
  if example.teacher is None:
    yield "(its own template would have given these)"
  yield from _quoted(other_text)
  at = first_difference(text, other_text)
  if at is not None:
    yield f"first difference in the text, at character {at}:"
    yield from _marked(text, other_text, at)
  shown = [
    token(tokens, ids[slot]) if slot < len(ids) else "the end"
    for tokens, ids in (
      (setup.tokenizer, ours),
      (setup.teacher_tokenizer, other.ids),
    )
  ]
  yield f"first difference in the ids, at {slot}: {shown[0]} / {shown[1]}"


def token(tokens: Tokenizer, index: int) -> str:
  """An id and its text."""
  text = decode(tokens, [index]) or tokens.vocabulary.get(index)
  return f"{index} {text!r}"


def decode(tokens: Tokenizer, ids: Sequence[int]) -> str:
  """Text of ids, special tokens and all."""
  return tokens.decode(ids, skip_special_tokens=False)


def _render(
  setup: Setup,
  name: str,
  source: SourceConfig,
  row: dict[str, Any],
  where: str,
) -> Example:
  theirs = setup.teacher_tokenizer
  data = setup.config.data

  def read(config: TemplateConfig, tokens: Tokenizer) -> Prompt:
    prompt = templates.prompt(config, row, tokens, where)
    if data.overlong == "truncate_left":
      ids = prompt.ids[-data.max_prompt_tokens :]
      prompt = dataclasses.replace(prompt, ids=ids)
    return prompt

  teacher = own = None
  if source.teacher_prompt is not None:
    teacher = read(source.teacher_prompt, theirs)
  elif not source.prompt.chat or theirs.has_chat_template:
    own = read(source.prompt, theirs)
  return Example(
    source=name,
    where=where,
    row=row,
    student=read(source.prompt, setup.tokenizer),
    teacher=teacher,
    own=own,
  )


def _quoted(text: str) -> Iterator[str]:
  """The lines of a text behind a bar; a long one without its middle."""
  if len(text) > 2 * _SHOWN:
    left_out = len(text) - 2 * _SHOWN
    text = f"{text[:_SHOWN]}\n[... {left_out} characters ...]\n{text[-_SHOWN:]}"
  for line in text.split("\n"):
    for part in textwrap.wrap(
      line, _WIDTH, drop_whitespace=False, replace_whitespace=False
    ) or [""]:
      yield f"  | {part}"


def _marked(ours: str, theirs: str, at: int) -> Iterator[str]:
  """Both texts around a character, and a mark below it."""
  start = max(at - CONTEXT, 0)
  for role, text in (("student", ours), ("teacher", theirs)):
    yield f"  {role}  {_escaped(text[start : at + CONTEXT])}"
  yield f"           {' ' * len(_escaped(ours[start:at]))}^"


def _escaped(text: str) -> str:
  """A text on one line."""
  return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
