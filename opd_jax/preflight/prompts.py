"""The first prompts as student and teacher read them, side by side."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from opd_jax import templates
from opd_jax.data.preparing import Example
from opd_jax.errors import InputError
from opd_jax.preflight.report import table
from opd_jax.setup import Setup
from opd_jax.templates import Prompt
from opd_jax.tokenizer import Tokenizer

CONTEXT = 30
_SHOWN = 240
_WIDTH = 74
_EDGE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered(Example):
  """An example as the models read it: cut to the window.

  Attributes:
    own: what the teacher's own tokenizer makes of the student's template; None
      where `teacher` is set, and where it has no chat template.
  """

  own: Prompt | None

  @property
  def teacher_ids(self) -> tuple[int, ...]:
    """The ids that the teacher reads."""
    return (self.teacher or self.student).ids

  @property
  def other(self) -> Prompt | None:
    """What the teacher reads, or would read by its own template."""
    return self.teacher or self.own


def examples(setup: Setup, count: int) -> list[Rendered]:
  """The first rows of each source that are used."""
  names = list(setup.config.data.sources)
  used: list[Example] = []
  # Rows that are dropped are rare: all are read only if it has to be.
  for asked in (4 * count, None):
    used = [
      example
      for example in setup.prompts.examples(asked)
      if _is_used(setup, example)
    ]
    if {example.source for example in used} == set(names):
      break
  return [
    _render(setup, example)
    for name in names
    for example in [e for e in used if e.source == name][:count]
  ]


def boundary(
  setup: Setup, example: Rendered, drawn: Sequence[int]
) -> list[str]:
  """Where prompt and completion meet, position by position.

  Args:
    setup: of the run.
    example: a row.
    drawn: the first ids of a completion; without them the slots are named.
  """
  rows = [("position", "student", "position", "teacher", "")]
  prompts = (example.student.ids, example.teacher_ids)
  tokens = (setup.tokenizer, setup.teacher_tokenizer_of(example.source))
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


def side_by_side(setup: Setup, example: Rendered) -> Iterator[str]:
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
    yield "(its own tokenizer has no such chat template)"
    return
  theirs = setup.teacher_tokenizer_of(example.source)
  other_text = decode(theirs, other.ids)
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
      (theirs, other.ids),
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


def _is_used(setup: Setup, example: Example) -> bool:
  config = setup.config.data
  read = [prompt for prompt in (example.student, example.teacher) if prompt]
  lengths = [len(prompt.ids) for prompt in read]
  fits = max(lengths) <= config.max_prompt_tokens
  return min(lengths) > 0 and (fits or config.overlong == "truncate_left")


def _render(setup: Setup, example: Example) -> Rendered:
  window = setup.config.data.max_prompt_tokens
  config = setup.config.data.sources[example.source].prompt
  theirs = setup.teacher_tokenizer_of(example.source)

  def cut(prompt: Prompt) -> Prompt:
    return dataclasses.replace(prompt, ids=prompt.ids[-window:])

  own = None
  if example.teacher is None and (theirs.has_chat_template or not config.chat):
    # A template without the switch that the student's has is left at that.
    with contextlib.suppress(InputError):
      own = cut(templates.prompt(config, example.row, theirs, example.where))
  return Rendered(
    source=example.source,
    index=example.index,
    where=example.where,
    row=example.row,
    student=cut(example.student),
    teacher=cut(example.teacher) if example.teacher else None,
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
